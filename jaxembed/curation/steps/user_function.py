"""The step `function`: a Python function of the user."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from jaxembed.config.curation import FunctionStepConfig
from jaxembed.curation.steps.curated_row import CuratedRow, PreparedStep, RowStepError, StepOutcome, encode_row
from jaxembed.data.schema import Row
from jaxembed.data.sources import ROW_SCHEMAS
from jaxembed.errors import UserError, summarize

UserFunction = Callable[[dict[str, Any]], Any]


def make_function_step(config: FunctionStepConfig) -> PreparedStep:
    """Return the step. It raises `RowStepError` if the function fails and `on_error` is stop.

    Raises:
        UserError: The function cannot be imported.
    """
    function = import_function(config.function)

    def apply(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        return [call(row) for row in rows]

    def call(curated: CuratedRow) -> StepOutcome:
        try:
            row = function(copy.deepcopy(dict(curated.fields)))
            if row is None:
                return StepOutcome(None, ("dropped",))
            checked = check_returned_row(row, curated.format)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() in it would end the command with the code of success
            problem = f"{type(error).__name__}: {summarize(error)}"
            if config.on_error == "stop":
                advice = "Correct it and run the same command, or set on_error of the step to drop or keep."
                raise RowStepError(curated, f"{config.function} failed ({problem}). {advice}") from None
            return StepOutcome(curated.fields if config.on_error == "keep" else None, (f"failed with {type(error).__name__}",))
        return StepOutcome(checked, ("changed",) if checked != curated.fields else ())

    return PreparedStep(apply, hash_code(function))


def hash_code(function: UserFunction) -> str:
    """Return a hash of the source code of a function's module; empty if the source is not available."""
    try:
        return hashlib.sha256(inspect.getsource(inspect.getmodule(function) or hash_code).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


def import_function(path: str) -> UserFunction:
    """Return the function at a dotted path. Raise `UserError` if there is none."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(
            f"function {path}: the module {module_name} cannot be imported ({type(error).__name__}: {summarize(error)}). "
            "Install it, or add its folder to PYTHONPATH."
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"function {path}: {module_name} has no function {name}. Check the name.")
    return function


def check_returned_row(row: Any, format_name: str) -> Row:
    """Return the row as it is read back from a file. Raise `ValueError` if it is not a valid row."""
    if not isinstance(row, dict):
        raise ValueError(f"returned a {type(row).__name__} (expected a row or None)")
    if problem := ROW_SCHEMAS[format_name].check(row):
        raise ValueError(f"returned a row that is not valid: {problem}")
    line = encode_row(row)
    line.encode()  # raises an error for a lone surrogate, which cannot be written
    checked: dict[str, Any] = json.loads(line)
    return checked
