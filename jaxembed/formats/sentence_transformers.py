"""The modules that a sentence-transformers folder lists, and its Dense module, which is our projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxembed.config.fields import Fields
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json, read_json_value
from jaxembed.model.embedder import ACTIVATIONS
from jaxembed.model.families import MOST

LISTING = "modules.json"


def modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each module in order; none where the folder lists none."""
    listing = folder / LISTING
    if not exists(listing):
        return []
    try:
        return [(str(m["type"]).rsplit(".", 1)[-1], folder / str(m["path"])) for m in read_json_value(listing)]
    except (TypeError, KeyError):
        raise UserError(f"{listing}: expected a list of modules, each with type and path") from None


def projection_weights(folder: Path) -> Path | None:
    """The file with the weights of a folder's Dense module, if it lists one."""
    return next((path / "model.safetensors" for kind, path in modules(folder) if kind == "Dense"), None)


def projection_choices(dense: Path, width: int) -> dict[str, Any]:
    """What the folder of a Dense module says, under the names of `EmbeddingSpec`; `width` is that of the model before it.

    `UserError` on what goes beyond a matrix, a bias and an activation that we know.
    """
    where = str(dense / "config.json")
    fields = Fields(read_json(dense / "config.json"), where)
    theirs = fields.text("activation_function", "torch.nn.modules.activation.Tanh")
    activation = theirs.rsplit(".", 1)[-1].lower()
    if activation not in ACTIVATIONS or not theirs.startswith("torch.nn."):
        raise UserError(f"{where}: activation_function is {theirs}; supported: torch.nn's Identity and Tanh")
    if fields.whole("in_features", most=MOST) != width:
        raise UserError(f"{where}: in_features is {fields.whole('in_features')}; expected {width}, the width of the model")
    around = {fields.text(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")}
    if around != {"sentence_embedding"} or fields.flag("use_residual"):
        raise UserError(f"{where}: only a Dense module from sentence_embedding to itself, without use_residual, is supported")
    return {
        "projection": fields.whole("out_features", most=MOST),
        "projection_bias": fields.flag("bias", True),
        "projection_activation": activation,
    }
