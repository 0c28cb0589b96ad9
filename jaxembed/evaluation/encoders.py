"""Load the models that are evaluated, after checks that need no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxembed.errors import UserError
from jaxembed.evaluation.task_encoder import TaskEncoder, check_widths, name_model
from jaxembed.files import expand_home
from jaxembed.search.precision import Precision, find_ranges, needs_ranges, read_ranges

if TYPE_CHECKING:
    import numpy as np


def choose_widths(model: str, checkpoint: str, widths: Sequence[int], max_length: int | None) -> tuple[int, tuple[int, ...]]:
    """Find a model without loading its weights. Return the width of its vectors, and the widths to score.

    Raises:
        UserError: There is no such model, or its vectors or its maximum length are smaller than the options ask for.
    """
    from jaxembed.hub.resolve import find_model  # imports JAX

    base = find_model(model, checkpoint)
    width = base.spec.projection or base.transformer.width
    chosen_widths = check_widths(widths, base.spec, width, model)
    if max_length is not None and max_length > base.transformer.max_positions:
        raise UserError(
            f"--max-length: {max_length} is above the model's limit ({base.transformer.max_positions} tokens). Lower it."
        )
    return width, chosen_widths


def load_encoder(
    model: str,
    checkpoint: str = "best",
    backend: str = "jax",
    *,
    widths: Sequence[int] = (),
    max_length: int | None = None,
    **options: Any,
) -> TaskEncoder:
    """Load a model for evaluation.

    Args:
        model: Run directory, folder or hub id.
        checkpoint: Checkpoint of a run: best, last, or a step.
        backend: jax, or sentence-transformers for an exported folder.
        widths: Widths at which tasks are scored.
        max_length: Maximum tokens of a text. Default: the model's.
        **options: layers, adapter and fsdp, as options of the commands.

    Raises:
        UserError: The model cannot be loaded, or an option does not apply to it or to the backend.
    """
    width, chosen_widths = choose_widths(model, checkpoint, widths, max_length)
    if backend == "sentence-transformers":
        if options.get("layers") is not None or options.get("adapter") is not None:
            raise UserError(
                "--backend sentence-transformers: --layers and --adapter apply to the JAX model only. Export the model with "
                "these options, and score that folder."
            )
        if options.get("fsdp", 1) != 1:
            raise UserError("--backend sentence-transformers: --fsdp applies to the JAX model only. Omit it.")
        from jaxembed.evaluation.torch_encoder import load_torch_encoder

        encoder = load_torch_encoder(expand_home(model), max_length)
    else:
        encoder = _load_jax_encoder(model, checkpoint, max_length, **options)
    encoder.width, encoder.widths = width, chosen_widths
    return encoder


def _load_jax_encoder(model: str, checkpoint: str, max_length: int | None, fsdp: int = 1, **options: Any) -> TaskEncoder:
    from jaxembed.devices.mesh import make_fsdp_mesh
    from jaxembed.hub.embedder import Embedder
    from jaxembed.hub.identity import compute_model_digest

    embedder = Embedder.load(model, checkpoint=checkpoint, mesh=make_fsdp_mesh(fsdp), **options)
    if max_length is not None:
        embedder = embedder.with_spec(embedder.spec.replace(max_length=max_length))

    def encode(texts: Sequence[str], prompt: str) -> np.ndarray:
        return embedder.encode(texts, prompt=prompt)

    revision = f"{embedder.revision}-{compute_model_digest(embedder)}"
    return TaskEncoder(encode, embedder.spec, name_model(expand_home(model)), revision)


def set_precisions(encoder: TaskEncoder, model: str, precisions: Sequence[Precision], ranges: str | None) -> None:
    """Set the precisions at which a model is scored, and the ranges that int8 and uint8 need.

    Args:
        encoder: The model.
        model: Its name.
        precisions: Values of --precision.
        ranges: Value of --ranges. None: the ranges in the folder of the model.

    Raises:
        UserError: There are no ranges, or they do not fit the vectors.
    """
    encoder.precisions = tuple(dict.fromkeys(precisions))
    if path := find_ranges(encoder.precisions, model, ranges):
        if len(encoder.widths) > 1 and needs_ranges(encoder.precisions[0]):
            raise UserError(f"--precision {encoder.precisions[0]}: its ranges fit one width. Name float32 first, or one --dim.")
        encoder.ranges = read_ranges(path, encoder.versions[0].width or encoder.width)


def check_compared_model(model: str, backend: str, widths: Sequence[int], max_length: int | None) -> None:
    """Check that the model of --compare exists and fits the options, without loading its weights. Raises `UserError`."""
    from jaxembed.hub.resolve import find_base_with_weights

    if backend == "sentence-transformers":
        from jaxembed.hub.torch_model import check_is_sentence_transformer

        check_is_sentence_transformer(expand_home(model))
    find_base_with_weights(model)  # also rejects a run with several adapters: no option selects one here
    choose_widths(model, "best", widths, max_length)
