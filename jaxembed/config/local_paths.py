"""Shorten local paths in published files to their last part."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePath
from typing import Any

import yaml

ABSOLUTE_PATH = re.compile(r"(/|~|[A-Za-z]:[\\/])\S")  # start of a path of this machine


def shorten_path(name: str) -> str:
    """Return the last part of an absolute local path, to keep local folders private. Return other names unchanged."""
    is_local = ABSOLUTE_PATH.match(name) is not None
    return PurePath(name.replace("\\", "/")).name or name if is_local else name


def shorten_command(command: str) -> str:
    """Return a command line with absolute paths shortened, in arguments and in settings of the form key=path."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        words.append(f"{key}={shorten_path(value)}" if equals else shorten_path(word))
    return shlex.join(words)


def shorten_paths_in_yaml(text: str) -> str:
    """Return a config in YAML with all absolute paths shortened."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [shorten(entry) for entry in value]
        return shorten_path(value) if isinstance(value, str) else value

    tree = yaml.safe_load(text)
    shortened = shorten(tree)
    return text if shortened == tree else yaml.safe_dump(shortened, sort_keys=False, allow_unicode=True)
