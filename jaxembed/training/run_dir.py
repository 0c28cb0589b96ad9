"""The run directory: what identifies a run, written once and compared when it is resumed."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxembed.config import Config
from jaxembed.config.sections import read_tree
from jaxembed.devices import processes
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json, write_json, write_text

log = logging.getLogger("jaxembed")

RECORD = "base.json"  # of the base of a run: a folder that has it is a run

PACKAGES = (
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


def open_run(config: Config) -> Path:
    """The run directory with config.yaml in it. Refuses one that belongs to another config; a config alone is no run yet.

    The mesh may be another: a run goes on with any number of devices. The first of several processes makes the directory,
    which the others, after it, must find.
    """
    run_dir = Path(config.run.dir)
    recorded = run_dir / "config.yaml"
    has_config = exists(recorded)
    others = exists(run_dir) and any(path != recorded and path.suffix != ".partial" for path in run_dir.iterdir())
    if not processes.is_first():
        if not has_config:
            told = f"process {processes.index()} does not find what the first one wrote; name a run.dir that all of them share"
            raise UserError(f"{run_dir}: {told}")
        return run_dir
    if has_config and others:
        before, now = ({**tree, "mesh": None} for tree in (read_run_file(read_tree, recorded), yaml.safe_load(config.dump())))
        changed = list(differences(before, now))
        if changed:
            raise UserError(
                f"{run_dir}: belongs to another config ({'; '.join(changed[:4])}); name another run.dir, or remove it"
            )
        return run_dir
    if others:
        raise UserError(f"{run_dir}: holds files but no run; name another run.dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(recorded, config.dump())
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); name another run.dir") from None
    return run_dir


def check_alike(config: Config) -> None:
    """`UserError` where the first process of a run has another config than this one."""
    firsts = processes.of_first(config.dump().encode()).decode()
    changed = list(differences(yaml.safe_load(firsts), yaml.safe_load(config.dump())))
    if changed:
        raise UserError(f"not the config of the run's first process ({'; '.join(changed[:4])}); give all of them the same")


def record(run_dir: Path, name: str, value: Mapping[str, Any], told: str) -> None:
    """Writes `name`.json, or compares it with what is there: `UserError` says with `told` what differs."""
    path = run_dir / f"{name}.json"
    if not path.is_file():
        write_json(path, value)
        return
    changed = list(differences(read_run_file(read_json, path), value))
    if changed:
        raise UserError(f"{run_dir}: {told} ({'; '.join(changed[:4])}); restore it, or name another run.dir")


def read_run_file(
    read: Callable[[Path], dict[str, Any]], path: Path, otherwise: str = "name another run.dir"
) -> dict[str, Any]:
    """What the run wrote to a file; where it is damaged, the `UserError` says to restore it, or `otherwise`."""
    try:
        return read(path)
    except UserError as error:
        raise UserError(f"{error}; this file of the run is damaged: restore it, or {otherwise}") from None


def note_versions(run_dir: Path) -> None:
    """Writes versions.json; warns where a resumed run's differ, since its losses may then differ in the last bits."""
    path = run_dir / "versions.json"
    now = versions()
    if path.is_file():
        changed = list(differences(read_run_file(read_json, path), now))
        if changed:
            log.warning("not the versions this run began with, so not bit for bit the same: %s", "; ".join(changed))
    if processes.is_first():
        write_json(path, now)


def versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{key}.{i}")
    elif before != after:
        yield f"{key}: {_short(before)} -> {_short(after)}"


def _short(value: Any, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
