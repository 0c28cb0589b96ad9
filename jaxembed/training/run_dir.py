"""The run directory. It records the identity of a run, which is compared when the run is resumed."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxembed.config import Config, read_run_config
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json, read_text, write_json, write_text
from jaxembed.formats.run_files import TOKENIZER_FOLDER, read_run_file
from jaxembed.training.resume_settings import collect_compared_settings, keep_recorded_equality
from jaxembed.training.run_lock import RUN_LOCK_FILE, RunLock, check_unlocked

log = logging.getLogger("jaxembed")

MAX_LISTED_CHANGES = 4
MAX_VALUE_CHARS = 200

RECORDED_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
    "jaxembed",
)


def check_run_dir(config: Config) -> Config:
    """Check that the run directory of a config is new, or holds a run that the config resumes.

    Only settings that change the losses are compared (`jaxembed.training.resume_settings`). A directory that holds nothing but
    a config and a tokenizer is not a run yet.

    Returns:
        The config with the rules that the run has recorded (`keep_recorded_equality`).

    Raises:
        UserError: The directory belongs to another config, holds files of something else, or another job trains there.
    """
    run_dir = Path(config.run.dir)
    if not _holds_run(run_dir):
        return config
    recorded_config = _check_settings(config, run_dir)
    check_unlocked(run_dir)
    return keep_recorded_equality(recorded_config, config)


def _check_settings(config: Config, run_dir: Path) -> Config:
    """Return the config of the run in a directory that holds files. Raise `UserError` unless `config` resumes that run."""
    config_path = run_dir / "config.yaml"
    if not exists(config_path):
        raise UserError(f"{run_dir}: holds files, but not a run. Name another run.dir.")
    recorded_config = read_run_file(read_run_config, config_path)
    if changes := _summarize_differences(*collect_compared_settings(recorded_config, config)):
        raise UserError(f"{run_dir}: belongs to another config ({changes}). Name another run.dir, or restore the config.")
    return recorded_config


def create_run_dir(config: Config, lock: RunLock) -> Path:
    """Create the run directory of a config with config.yaml in it, unless it holds a run (`check_run_dir`), and lock it.

    Process 0 does so. Call this on the other processes afterwards: they must find the directory.

    Args:
        config: Settings of the run.
        lock: The lock of the directory.

    Raises:
        UserError: The directory cannot be written, another job trains there, or another process does not find it.
    """
    run_dir = Path(config.run.dir)
    config_path = run_dir / "config.yaml"
    if not processes.is_first():
        if not exists(config_path):
            problem = f"process {processes.index()} does not find what process 0 wrote"
            raise UserError(f"{run_dir}: {problem}. Name a run.dir that all processes share.")
        return run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if _holds_run(run_dir):
            _check_settings(config, run_dir)  # again: another job may have begun a run in the meantime
        else:
            # A start that failed may have left the tokenizer of another base.
            shutil.rmtree(run_dir / TOKENIZER_FOLDER, ignore_errors=True)
            write_text(config_path, config.dump())
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}). Name another run.dir.") from None
    return run_dir


def _holds_run(run_dir: Path) -> bool:
    """Return whether a directory has files of a run, or of something else (`_check_settings` distinguishes them).

    A config and a tokenizer that a run has written, a lock, and unfinished files are not a run yet.

    Raises:
        UserError: Training would replace a config that no run has written.
    """
    if not exists(run_dir):
        return False
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: is a file (expected a run directory). Name another run.dir.")
    names = {path.name for path in run_dir.iterdir() if path.suffix != ".partial"} - {RUN_LOCK_FILE}
    if "config.yaml" not in names or names - {"config.yaml", TOKENIZER_FOLDER}:
        return bool(names)
    config_path = run_dir / "config.yaml"
    if not _is_run_config(config_path):
        raise UserError(f"{config_path}: is not a config that a run has written, and would be replaced. Name another run.dir.")
    return False


def _is_run_config(path: Path) -> bool:
    """Return whether a config is written as a run of this version writes it, with all defaults."""
    try:
        return read_text(path) == read_run_config(path).dump()
    except UserError:
        return False


def check_same_config(config: Config) -> None:
    """Raise `UserError` if process 0 has another config than this process."""
    own_config = config.dump()
    first_config = processes.broadcast_from_first(own_config.encode()).decode()
    if first_config == own_config:
        return
    if changes := _summarize_differences(yaml.safe_load(first_config), yaml.safe_load(own_config)):
        raise UserError(f"config: differs from that of process 0 ({changes}). Give all processes the same config.")


class Record(NamedTuple):
    """What identifies a part of a run.

    Attributes:
        name: Name of its file in the run directory, without the suffix.
        value: The content.
        problem: Phrase of the error if the value differs, such as "its base changed".
        compared_keys: Keys of the value that are compared. Default: all.
    """

    name: str
    value: Mapping[str, Any]
    problem: str
    compared_keys: Collection[str] | None = None


def check_record(run_dir: Path, record: Record) -> None:
    """Compare a record with its file in the run directory, if there is one. Raise `UserError` if they differ."""
    path, keys = run_dir / f"{record.name}.json", record.compared_keys
    if not path.is_file():
        return
    recorded, current = (
        {key: entry for key, entry in tree.items() if keys is None or key in keys}
        for tree in (read_run_file(read_json, path), record.value)
    )
    if changes := _summarize_differences(recorded, current):
        raise UserError(f"{run_dir}: {record.problem} ({changes}). Restore it, or name another run.dir.")


def write_record(run_dir: Path, record: Record) -> None:
    """Write a record to the run directory, unless its file is there."""
    path = run_dir / f"{record.name}.json"
    if not path.is_file():
        write_json(path, record.value)


def record_versions(run_dir: Path) -> None:
    """Write versions.json. Warn if a resumed run had other versions: its losses may differ in the last bits."""
    path = run_dir / "versions.json"
    versions = collect_package_versions()
    if path.is_file() and (changes := _summarize_differences(read_run_file(read_json, path), versions)):
        log.warning("versions differ from those of the last start of this run: results may not be bit-identical (%s)", changes)
    if processes.is_first():
        write_json(path, versions)


def collect_package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine what a run computes."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _summarize_differences(before: Any, after: Any) -> str:
    """Return the first differences of two trees on one line; empty if they are equal."""
    return "; ".join(list(iter_differences(before, after))[:MAX_LISTED_CHANGES])


def iter_differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Yield `key: old -> new` for every leaf in which two trees of dicts and lists differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from iter_differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from iter_differences(*pair, f"{key}.{i}")
    elif before != after:
        yield f"{key}: {_shorten(before)} -> {_shorten(after)}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."
