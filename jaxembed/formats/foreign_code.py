"""Refuse model folders that name their own Python code, before transformers or sentence-transformers loads them.

Both libraries import what the JSON files of a folder name: modules, models, tokenizers, activations, and kernels. A folder
is therefore loaded by them only if all of these belong to the libraries themselves or to jaxembed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxembed.errors import UserError
from jaxembed.files import read_json_value
from jaxembed.formats.sentence_transformers import STOCK_TYPE, TOKEN_POOLING_FILE, has_own_token_pooling, read_modules

TORCH_ACTIVATION = re.compile(r"torch\.nn(\.\w+)+")
CONFIG_PATTERN = "*config*.json"  # name of the JSON files that can name code, besides modules.json


def _is_stock(value: Any) -> bool:
    return isinstance(value, str) and STOCK_TYPE.fullmatch(value) is not None


def _is_stock_activation(value: Any) -> bool:
    """Return whether a value is a short name such as gelu, or a class of torch.nn or sentence-transformers."""
    return isinstance(value, str) and ("." not in value or _is_stock(value) or TORCH_ACTIVATION.fullmatch(value) is not None)


def _is_part_of_transformers(value: Any) -> bool:
    library = value.get("parent_library") if isinstance(value, Mapping) else None
    return str(library).split(".")[0] in ("transformers", "None")


# Keys that name code, each with a function that returns whether a value names code of the libraries.
CODE_KEYS: Mapping[str, Callable[[Any], bool]] = {
    "auto_map": lambda value: False,
    "custom_pipelines": lambda value: False,
    "activation_fn": _is_stock_activation,
    "activation_function": _is_stock_activation,
    "tokenizer_class": lambda value: not isinstance(value, str) or "." not in value or _is_stock(value),
    "types": lambda value: not isinstance(value, Mapping) or all(map(_is_stock, value.values())),  # of a Router
    # A name with a slash is a repository of compiled kernels.
    "attn_implementation": lambda value: "/" not in str(value),
    "_attn_implementation": lambda value: "/" not in str(value),
    # PEFT imports the modules that these two name.
    "auto_mapping": _is_part_of_transformers,
    "megatron_config": lambda value: False,
}


def check_names_no_code(folder: Path) -> None:
    """Check that the files of a folder name only code of transformers, sentence-transformers, torch.nn, and jaxembed.

    Args:
        folder: Folder that one of these libraries is about to load.

    Raises:
        UserError: A file names other code. Nothing is imported.
    """
    if "TokenPooling" in dict(read_modules(folder)) and not has_own_token_pooling(folder):
        raise UserError(
            f"{folder / TOKEN_POOLING_FILE.name}: missing or changed, so it may compute something else than the module of "
            "jaxembed, and it is not run. Export the model again."
        )
    for path in sorted(folder.rglob(CONFIG_PATTERN)):
        value = read_json_value(path)
        for key, entry in _iter_entries(value):
            if entry is not None and key in CODE_KEYS and not CODE_KEYS[key](entry):
                raise UserError(
                    f"{path}: {key} names Python code of its own ({str(entry)[:80]}), which is not run. Use a model of stock "
                    "classes. If stock classes compute the same, remove the key from a copy of the folder."
                )


def _iter_entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of the objects in a JSON value, nested ones too."""
    if isinstance(value, Mapping):
        yield from value.items()
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for entry in inner:
        yield from _iter_entries(entry)
