"""Read the rows of texts of an export, and write its vectors or the reason of its refusal.

A program is started as `python PROGRAM.py RESULTS.jsonl VARIANTS EXPORT [EXPORT ...]` and imports nothing from jaxembed.
VARIANTS are names of variants of the program, separated by commas. EXPORT.json has the rows of an export.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # prompt (complete), text, group, vector
Encode = Callable[[str, list[Row]], Any]  # (folder, rows) -> vectors [N, D], with None for texts that the reader refuses
SHORT_DIM = 32  # dimensions of truncated vectors, as in benchmarks/readers.py


def read_rows(folder: str) -> list[Row]:
    """Return the rows of an export."""
    return list(json.loads(Path(f"{folder}.json").read_text(encoding="utf-8")))


def has_code(folder: str) -> bool:
    """Return whether an export has Python code: that of a pooling with weights."""
    return (Path(folder) / "token_pooling.py").is_file()


def join_texts(rows: list[Row]) -> list[str]:
    """Return prompt and text of each row as one text, for readers without prompts."""
    return [row["prompt"] + row["text"] for row in rows]


def encode_by_prompt(rows: list[Row], encode: Callable[[list[str], str], Any]) -> list[Any]:
    """Encode the rows of each prompt together. Return their vectors in the order of the rows."""
    vectors: list[Any] = [None] * len(rows)
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        indices = [i for i, row in enumerate(rows) if row["prompt"] == prompt]
        for i, vector in zip(indices, encode([rows[i]["text"] for i in indices], prompt), strict=True):
            vectors[i] = vector
    return vectors


def find_versions(packages: Iterable[str]) -> str:
    """Return the names and versions of packages."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def run(variants: Mapping[str, Encode], *packages: str) -> None:
    """Read every export that the command line names, and append one line for each variant to the file of results.

    Args:
        variants: Functions by name that return the vectors of an export. An exception counts as a refusal.
        *packages: Packages whose versions the table names.
    """
    results, names, folders = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    versions = find_versions(packages)
    for folder, name in itertools.product(folders, names):
        result: dict[str, Any] = {"kind": Path(folder).name, "variant": name, "versions": versions}
        try:
            vectors = variants[name](folder, read_rows(folder))
            result["vectors"] = [None if vector is None else [float(x) for x in vector] for vector in vectors]
        except Exception as error:  # any exception of a reader counts as a refusal
            result["refusal"] = " ".join(f"{type(error).__name__}: {error}".split())
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
