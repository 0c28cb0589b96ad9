"""Reduce a model to some of its layers, or to narrower feed-forward layers: sizes, config and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.errors import UserError
from jaxembed.formats.hf_config import parse_hf_config
from jaxembed.model.families import TransformerConfig
from jaxembed.model.parameters import replace_layers


class SizedModel(NamedTuple):
    """A transformer config with the matching Hugging Face config and parameters.

    Attributes:
        transformer: The transformer config.
        hf_config: Its Hugging Face config.
        params: Parameters of the whole model.
    """

    transformer: TransformerConfig
    hf_config: Mapping[str, Any]
    params: Any


def select_layers(model: SizedModel, indices: Sequence[int]) -> SizedModel:
    """Return a model with some of its layers, followed by the last norm.

    Args:
        model: The model.
        indices: Layers to keep, counted from 0, in ascending order.

    Raises:
        UserError: The config of the family cannot describe these layers.
    """
    transformer, rows = model.transformer, jnp.asarray(indices)
    config = dict(model.hf_config) | {"num_hidden_layers": len(indices)}
    if kinds := config.get("layer_types"):
        config["layer_types"] = [kinds[i] for i in indices]
    windows = tuple(transformer.windows[i] for i in indices) if transformer.windows else ()
    cut = dataclasses.replace(transformer, layers=len(indices), windows=windows)
    if transformer.unnormed_first_layer and indices[0]:
        raise UserError(f"layers: the first layer of {transformer.family} has no norm before it. Keep layer 0.")
    layers = jax.tree.map(lambda x: x[rows], model.params["decoder"]["layers"])
    return SizedModel(cut, config, replace_layers(model.params, layers))


def check_config(model: SizedModel) -> None:
    """Check that the Hugging Face config of a reduced model describes it.

    Raises:
        UserError: The config cannot describe the model.
    """
    if parse_hf_config(model.hf_config, "the pruned model") != model.transformer:
        raise UserError(
            f"the config of {model.transformer.family} cannot describe the pruned model: a rule determines which layers "
            "have a sliding window. Keep other layers, or the first ones by export --layers N."
        )


def select_mlp_units(model: SizedModel, units: np.ndarray) -> SizedModel:
    """Return a model with some units of each feed-forward layer.

    Args:
        model: The model.
        units: Units to keep, [L, F'], in ascending order.
    """
    layers = model.params["decoder"]["layers"]
    index = jnp.asarray(units)

    def select(name: str, part: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        if name == "down":
            return {**part, "kernel": jnp.take_along_axis(part["kernel"], index[:, :, None], axis=1)}
        cut = {"kernel": jnp.take_along_axis(part["kernel"], index[:, None, :], axis=2)}
        return cut | ({"bias": jnp.take_along_axis(part["bias"], index, axis=1)} if "bias" in part else {})

    mlp = {name: select(name, part) for name, part in layers["mlp"].items()}
    width = units.shape[1]
    return SizedModel(
        dataclasses.replace(model.transformer, mlp_width=width),
        dict(model.hf_config) | {"intermediate_size": width},
        replace_layers(model.params, {**layers, "mlp": mlp}),
    )


def score_mlp_units(layers: Any, activity: np.ndarray | None) -> np.ndarray:
    """Score every unit of the feed-forward layers by the norm of its contribution to the hidden states, [L, F].

    Args:
        layers: Parameters of the layers.
        activity: Root of the mean squared activation of each unit on some texts, [L, F]. The score is then its product with the
            norm of the unit's row in the `down` kernel. None: the norms of its weights in all kernels are multiplied instead.
    """
    mlp = {name: np.asarray(part["kernel"], np.float64) for name, part in layers["mlp"].items()}
    score = np.linalg.norm(mlp.pop("down"), axis=2)
    if activity is not None:
        return score * activity
    for kernel in mlp.values():
        score = score * np.linalg.norm(kernel, axis=1)
    return score
