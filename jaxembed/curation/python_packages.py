"""Write training pairs of the installed Python packages: docstring -> function. Nothing is downloaded.

    files --ast--> (docstring, code) --remove near duplicates--> train.jsonl | functions/ | package/

`functions/` and `package/` are BEIR folders held out from training: functions drawn at random from all packages, and
one package as a whole. No package is imported or run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxembed.curation.code_duplicates import NearDuplicateFilter
from jaxembed.curation.python_functions import FunctionCounts, FunctionPair, SourceFile, parse_files
from jaxembed.data.beir import write_beir
from jaxembed.data.jsonl import write_jsonl
from jaxembed.data.scratch import move_into_place, open_scratch_folder
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json

DEFAULT_PACKAGES = (
    "stdlib", "numpy", "scipy", "jax", "flax", "optax", "orbax", "sklearn", "pandas", "grain", "networkx", "datasets",
    "transformers", "torch", "sympy",
)  # fmt: skip
DEFAULT_HOLDOUT_PACKAGE = "networkx"
DEFAULT_HOLDOUT_FUNCTIONS = 1000
MAX_HOLDOUT_PACKAGE_PAIRS = 1000
FORMAT_VERSION = 1  # Part of the recorded inputs. Raise it when this code would write other files from the same packages.
EXCLUDED_PATH = re.compile(r"(^|[/_])(conftest|test|tests|testing)[/_.]|(site|dist)-packages/")
PACKAGES_REPORT_FILE = "report.json"
log = logging.getLogger(__name__)


def write_package_pairs(
    out: Path,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    holdout_package: str | None = DEFAULT_HOLDOUT_PACKAGE,
    holdout_functions: int = DEFAULT_HOLDOUT_FUNCTIONS,
) -> dict[str, int]:
    """Write the docstring pairs of installed packages to a folder, unless the folder already holds them.

    The folder gets train.jsonl, the BEIR folders functions/ and package/, and report.json. An empty held-out set has no
    folder. A package that is not installed is skipped with a warning. A kill leaves no folder.

    Args:
        out: Folder to write.
        packages: Import names of top-level packages. "stdlib" stands for the standard library.
        holdout_package: Import name of a package whose functions are all held out, or None. package/ has up to 1,000.
        holdout_functions: Number of functions drawn from the other packages for functions/.

    Returns:
        The number of pairs of each split: train, functions and package.

    Raises:
        UserError: `out` exists and holds something else, the held-out package or rensa is not installed, or no pair is left to
            train on.
    """
    # Find the files and compare them with those that an existing folder was written from.
    names = list(dict.fromkeys([*packages, *([holdout_package] if holdout_package else [])]))
    files = {name: found for name in names if (found := list(_iter_files(name)))}
    _check_installed(names, files, holdout_package)
    versions = _find_versions(list(files))
    inputs = _describe_inputs(files, versions, holdout_package, holdout_functions)
    if exists(out):
        return _read_existing_splits(out, inputs)

    # The filter imports rensa. It is created first, because parsing takes long.
    code_filter = NearDuplicateFilter()
    pairs, counts = parse_files([file for package_files in files.values() for file in package_files])
    # The first of several near duplicates is kept. It should be the one of the held-out package.
    pairs.sort(key=lambda pair: pair.package != holdout_package)
    unique_pairs = _remove_duplicates(pairs, code_filter, counts)

    splits = _split_pairs(unique_pairs, holdout_package, holdout_functions)
    split_sizes = {name: len(split) for name, split in splits.items()}
    report = {
        "packages": {name: {"version": versions[name], **counts[name]} for name in files},
        "total": dict(sum(counts.values(), Counter())),
        "splits": split_sizes,
        "inputs": inputs,
    }
    _write_folder(out, splits, report)
    return split_sizes


def _check_installed(names: Sequence[str], installed: Mapping[str, Any], holdout_package: str | None) -> None:
    """Warn of packages that are not installed. Raise `UserError` if the held-out one is not, or none is."""
    for name in names:
        if name in installed:
            continue
        if name == holdout_package:
            raise UserError(f"--holdout-package: {name!r} is not installed. Install it or hold out another package.")
        log.warning("package %r has no Python files in this environment and is skipped; expected an import name", name)
    if not installed:
        raise UserError(f"--packages: none of {', '.join(names)} is installed. Give import names, or stdlib.")


def _iter_files(package: str) -> Iterator[SourceFile]:
    """Iterate over the Python files of a package in sorted order, without tests. An absent package has none."""
    for root in _find_roots(package):
        base = root if package == "stdlib" else root.parent
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            relative_path = path.relative_to(base).as_posix()
            if not EXCLUDED_PATH.search(relative_path):
                yield SourceFile(package, path, relative_path)


def _find_roots(package: str) -> list[Path]:
    """Return the folders of a package, or the file of a module; none if it is not installed."""
    if package == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        return []
    return [Path(root) for root in spec.submodule_search_locations or [spec.origin or ""] if Path(root).exists()]


def _find_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return for each package the distributions that own it, such as "numpy 1.26.4". Packages without one belong to Python."""
    owners = importlib.metadata.packages_distributions()
    versions = {}
    for package in packages:
        distributions = sorted({*owners.get(package, [])})
        named = [f"{name} {importlib.metadata.version(name)}" for name in distributions]
        versions[package] = ", ".join(named) or f"python {platform.python_version()}"
    return versions


def _describe_inputs(
    files: Mapping[str, Sequence[SourceFile]],
    versions: Mapping[str, str],
    holdout_package: str | None,
    holdout_functions: int,
) -> dict[str, Any]:
    """Return everything that determines the output. Names and sizes of files reveal a package edited in place."""
    sizes = [(file.package, file.relative_path, file.path.stat().st_size) for group in files.values() for file in group]
    return {
        "format": FORMAT_VERSION,
        "python": platform.python_version(),
        "packages": dict(versions),
        "holdout_package": holdout_package,
        "holdout_functions": holdout_functions,
        "files": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }


def _read_existing_splits(out: Path, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Return the split sizes of a folder that was written from the same inputs. Raise `UserError` for any other."""
    report = read_json(out / PACKAGES_REPORT_FILE) if exists(out / PACKAGES_REPORT_FILE) else {}
    recorded = report.get("inputs")
    if not isinstance(recorded, dict):
        raise UserError(f"{out}: already exists and holds no pairs of Python packages. Name another OUT.")
    # A list of package names in another order gives other pairs, and dicts compare equal in any order.
    changed = [key for key, value in inputs.items() if json.dumps(recorded.get(key)) != json.dumps(value)]
    if changed:
        raise UserError(f"{out}: holds pairs of other inputs (different: {', '.join(changed)}). Remove it or name another OUT.")
    log.info("%s: up to date, the packages are the same", out)
    return dict(report["splits"])


def _remove_duplicates(
    pairs: Sequence[FunctionPair], code_filter: NearDuplicateFilter, counts: Mapping[str, FunctionCounts]
) -> list[FunctionPair]:
    """Return the pairs without those whose docstring equals, or whose code nearly equals, that of an earlier pair."""
    unique_pairs, queries = [], set()
    for pair in tqdm(pairs, "removing copies", unit="function"):
        query = " ".join(re.findall(r"\w+", pair.query.lower()))
        if query in queries:
            counts[pair.package]["dropped: docstring equals another"] += 1
        elif not code_filter.add(pair.code):
            counts[pair.package]["dropped: code copies another"] += 1
        else:
            queries.add(query)
            unique_pairs.append(pair)
            counts[pair.package]["pairs"] += 1
    return unique_pairs


def _split_pairs(
    pairs: Sequence[FunctionPair], holdout_package: str | None, holdout_functions: int
) -> dict[str, list[FunctionPair]]:
    """Return the splits train, functions and package. The hash of a pair, not its position, decides if it is held out."""
    shuffled = sorted(pairs, key=lambda pair: hashlib.sha256(f"{pair.query}\n{pair.code}".encode()).digest())
    candidates = [pair for pair in shuffled if pair.package != holdout_package]
    if len(candidates) <= holdout_functions:
        raise UserError(
            f"--holdout-functions: no pair is left to train on ({len(candidates)} pairs, {holdout_functions} held out). "
            "Name more packages or hold out fewer functions."
        )
    held_out = set(candidates[:holdout_functions])
    return {
        "train": [pair for pair in pairs if pair.package != holdout_package and pair not in held_out],
        "functions": [pair for pair in pairs if pair in held_out],
        "package": [pair for pair in shuffled if pair.package == holdout_package][:MAX_HOLDOUT_PACKAGE_PAIRS],
    }


def _write_folder(out: Path, splits: Mapping[str, Sequence[FunctionPair]], report: Mapping[str, Any]) -> None:
    """Write the splits and the report, completely or not at all."""
    with open_scratch_folder(out) as scratch:
        (folder := scratch / "packages").mkdir()
        write_jsonl(folder / "train.jsonl", [{"query": pair.query, "pos": [pair.code], "neg": []} for pair in splits["train"]])
        for name in ("functions", "package"):
            if splits[name]:
                _write_holdout(folder / name, splits[name])
        (folder / PACKAGES_REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        move_into_place(folder, out)


def _write_holdout(folder: Path, pairs: Sequence[FunctionPair]) -> None:
    """Write pairs as a BEIR folder: docstrings are queries, functions are documents."""
    corpus = {pair.location: pair.code for pair in pairs}
    queries = {f"query:{pair.location}": pair.query for pair in pairs}
    write_beir(folder, corpus, queries, {f"query:{pair.location}": {pair.location: 1} for pair in pairs})
