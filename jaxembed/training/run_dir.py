"""The run directory: what identifies a run, written once and compared when it is resumed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxembed.config import Config
from jaxembed.errors import UserError

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
    """The run directory with config.yaml and versions.json in it. Refuses one that belongs to another config."""
    run_dir = Path(config.run.dir)
    recorded = run_dir / "config.yaml"
    if recorded.is_file():
        before = yaml.safe_load(recorded.read_text(encoding="utf-8"))
        changed = list(differences(before, yaml.safe_load(config.dump())))
        if changed:
            raise UserError(
                f"{run_dir}: belongs to another config ({'; '.join(changed[:4])}); name another run.dir, or remove it"
            )
        return run_dir
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir}: holds files but no run; name another run.dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        recorded.write_text(config.dump(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); name another run.dir") from None
    write_json(run_dir / "versions.json", versions())
    return run_dir


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        for name in before.keys() | after.keys():
            yield from differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif before != after:
        yield f"{key}: {before!r} -> {after!r}"
