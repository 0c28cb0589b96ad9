"""Fill the reference pages from the code when mkdocs builds the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jaxembed import config  # noqa: E402  (after the checkout is on the path)
from jaxembed.config.sections import table  # noqa: E402

PLACEHOLDER = re.compile(r"<!-- generated: ([\w-]+) -->")
HELP_COLUMNS = 110


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every `<!-- generated: NAME -->` of a page with what the code says today."""
    return PLACEHOLDER.sub(lambda found: GENERATORS[found.group(1)](), markdown)


def config_keys() -> str:
    """Return a heading and a table of keys for each section of the configuration."""
    header, rule, *rows = table(config.Config).splitlines()
    sections: dict[str, list[str]] = {}
    for row in rows:
        section = re.match(r"\| `(\w+)", row)
        assert section is not None, row
        sections.setdefault(section.group(1), []).append(row)
    return "\n\n".join("\n".join([f"## `{name}`", "", header, rule, *found]) for name, found in sections.items())


def command_options() -> str:
    """Return the help text of every command and subcommand."""
    return "\n\n".join(f"## {' '.join(['jaxembed', *command])}\n\n```text\n{help_text(command)}```" for command in commands())


def commands() -> list[list[str]]:
    """Return the words that select each command: top-level modules that run, and the subcommands of `data`."""
    package = ROOT / "jaxembed"
    runnable = [path.stem for path in sorted(package.glob("[!_]*.py")) if '__name__ == "__main__"' in path.read_text()]
    listing = help_text(["data"]).partition("\n  COMMAND\n")[2].partition("\n\n")[0]
    names = re.findall(r"^    (\w+)", listing, re.M)
    return [*([name] for name in runnable), ["data"], *(["data", name] for name in names)]


def help_text(command: list[str]) -> str:
    """Return what a command prints for `--help`."""
    name, *rest = command
    run = [sys.executable, "-m", f"jaxembed.{name}", *rest, "--help"]
    env = {**os.environ, "COLUMNS": str(HELP_COLUMNS), "PYTHONPATH": str(ROOT)}
    return subprocess.run(run, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout


GENERATORS = {"config-keys": config_keys, "command-options": command_options}
