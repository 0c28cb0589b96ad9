"""The output folder of a synthesis.

OUT/recipe.json               the recipe, model and inputs of the folder
OUT/answers/answers.jsonl     every request and answer (`store`)
OUT/TASK.jsonl                training rows, written when the synthesis ends
OUT/provenance/TASK.jsonl     one line for each of them: recipe, version, model, time, drawn values, keys of its requests
OUT/report.json, report.html
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from jaxembed.config.synthesis import SynthesisConfig, TaskConfig
from jaxembed.config.synthesis_steps import AskStepConfig
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, read_json, write_json
from jaxembed.synthesis.acceptance import AcceptedRow

RECIPE_FILE = "recipe.json"
ANSWERS_FILE = Path("answers") / "answers.jsonl"
PROVENANCE_FOLDER = "provenance"
# Fields that must match to continue an output, in the order in which differences are reported.
IDENTITY_FIELDS = {
    "recipe": "recipe",
    "version": "version",
    "model": "model",
    "config": "set of keys",
    "inputs": "content of the inputs",
}


def make_identity(config: SynthesisConfig, model: str, inputs_digest: str) -> dict[str, Any]:
    """Return the fields that must match to continue an output folder: everything but the number of rows."""
    settings = config.model_dump_json(exclude={"max_rows", "name", "version", "inputs"})
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return {"recipe": config.name, "version": config.version, "model": model, "config": digest, "inputs": inputs_digest}


def prepare_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Create an output folder, or check that an existing one can be continued.

    Raises:
        UserError: The folder holds something else, belongs to another recipe, model or inputs, or cannot be created.
    """
    path = out / RECIPE_FILE
    if path.exists():
        recorded = read_json(path)
        for key, name in IDENTITY_FIELDS.items():
            if recorded.get(key) != identity[key]:
                values = ""
                if key in ("recipe", "version", "model"):
                    values = f" (found {recorded.get(key)!r}; expected {identity[key]!r})"
                raise UserError(f"{out}: belongs to a synthesis with another {name}{values}. Name another output.")
        return
    allowed_names = (f"{RECIPE_FILE}.partial", ANSWERS_FILE.parent.name)  # stored answers may be copied from another output
    if out.exists() and (not out.is_dir() or any(file.name not in allowed_names for file in out.iterdir())):
        raise UserError(f"{out}: already exists, and is not the output of a synthesis. Remove it, or name another output.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(identity))
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror}). Name another output.") from None


class RowFiles:
    """Context manager that writes the files of rows and their provenance. They appear if the block ends without an error."""

    def __init__(self, out: Path, config: SynthesisConfig):
        """Start without rows."""
        self._out, self._config = out, config
        self._files: dict[str, tuple[IO[str], IO[str]]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> RowFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
            return
        with self._stack:  # a disk that is full now leaves none of the files
            for file in itertools.chain(*self._files.values()):
                file.flush()
        for task in self._config.tasks:
            if task.name not in self._files:  # files of an earlier run that requested more rows
                for path in self._list_paths(task):
                    path.unlink(missing_ok=True)

    def add(self, task: TaskConfig, accepted_row: AcceptedRow) -> None:
        """Write a row and its provenance."""
        if task.name not in self._files:
            rows_file, provenance_file = (self._open(path) for path in self._list_paths(task))
            self._files[task.name] = rows_file, provenance_file
        for file, content in zip(
            self._files[task.name], (accepted_row.row, self._make_provenance(task, accepted_row)), strict=True
        ):
            file.write(json.dumps(content, ensure_ascii=False) + "\n")

    def get_name(self, task: TaskConfig) -> str:
        """Return the name of the file of a task's rows; empty if there are none."""
        return self._list_paths(task)[0].name if task.name in self._files else ""

    def _list_paths(self, task: TaskConfig) -> Sequence[Path]:
        name = f"{task.name}.jsonl"
        return self._out / name, self._out / PROVENANCE_FOLDER / name

    def _open(self, path: Path) -> IO[str]:
        path.parent.mkdir(exist_ok=True)
        partial = self._stack.enter_context(atomic_write(path))
        return self._stack.enter_context(partial.open("w", encoding="utf-8"))

    def _make_provenance(self, task: TaskConfig, accepted_row: AcceptedRow) -> dict[str, Any]:
        """Return the provenance of a row."""
        draft = accepted_row.draft
        steps = {step.name: step for step in task.steps if isinstance(step, AskStepConfig)}
        drawn_values = {
            name: {key: draft.fields[name][key] for key in step.values} for name, step in steps.items() if step.values
        }
        origin = {"input": task.first.per, "input_row": draft.source_index + 1} if task.first.per else {}
        return {
            "recipe": self._config.name, "version": self._config.version, "task": task.name, "model": draft.model,
            "time": draft.time, **origin, "values": drawn_values, "requests": list(draft.request_keys),
        }  # fmt: skip
