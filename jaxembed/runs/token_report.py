"""Print the data of objectives that predict tokens."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from jaxembed.data.sources import Source
from jaxembed.data.token_batch import NOT_PREDICTED, TokenBatchBuilder
from jaxembed.errors import UserError
from jaxembed.training.stage import Stage

log = logging.getLogger("jaxembed")

MEASURED_TEXTS = 512  # texts of each source whose tokens are counted
MAX_SHOWN_TOKEN_TEXTS = 2  # texts of each source that are printed
MAX_SHOWN_TOKENS = 60  # tokens of a printed text


def show_token_data(stage: Stage) -> list[dict[str, Any]]:
    """Print the size of every source of the objectives that predict tokens, and its first texts as the model reads them.

    Returns:
        A report for each source. It has what `describe_rows` returns, "objective", "epochs", and for the measured texts
        "tokens" (`describe_lengths`) and "predicted", the share of their tokens that is predicted.

    Raises:
        UserError: No token of an objective's texts is predicted.
    """
    reports = []
    for label, builder in stage.batch_builder.token_builders.items():
        epochs, first_id, objective_reports = builder.plan.count_epochs(stage.config.train.steps), 0, []
        for source, source_epochs in zip(builder.plan.sources, epochs, strict=True):
            report = _show_source(stage, builder, source, first_id)
            objective_reports.append(report | {"objective": label, "epochs": source_epochs})
            first_id += len(source)
        if not any(report["predicted"] for report in objective_reports):
            names = ", ".join(report["name"] for report in objective_reports)
            raise UserError(
                f"{label}: no token of {names} is predicted (expected longer texts, a higher mask_rate, or a higher "
                "data.max_length)."
            )
        reports += objective_reports
    return reports


def _show_source(stage: Stage, builder: TokenBatchBuilder, source: Source, first_id: int) -> dict[str, Any]:
    """Print a source, whose first text has the id `first_id`. Return its report without objective and epochs."""
    texts = builder.read_texts(0, np.arange(first_id, first_id + min(MEASURED_TEXTS, len(source))))
    lengths = np.array([len(text.tokens) for text in texts])
    predicted_counts = np.array([np.sum(text.targets != NOT_PREDICTED) for text in texts])
    num_unpredicted = int(np.sum(predicted_counts == 0))
    predicted_share = int(predicted_counts.sum()) / max(1, int(lengths.sum()))
    log.info(
        "%s (%s): %s texts; %.0f tokens per text on average, %.1f%% of them predicted",
        source.name, source.format, f"{len(source):,}", lengths.mean(), 100 * predicted_share,
    )  # fmt: skip
    if num_unpredicted:
        log.info(
            "  %s of %s texts have no predicted token: they are too short, or truncated at data.max_length %s",
            f"{num_unpredicted:,}", f"{len(texts):,}", stage.tokenizer.spec.max_length,
        )  # fmt: skip
    for text in texts[:MAX_SHOWN_TOKEN_TEXTS]:
        log.info("  reads    %r", stage.tokenizer.hf_tokenizer.decode(text.tokens[:MAX_SHOWN_TOKENS]))
    return {
        **describe_rows(source),
        "predicted": predicted_share,
        "tokens": describe_lengths(lengths, stage.tokenizer.spec.max_length),
    }


def describe_rows(source: Source) -> dict[str, Any]:
    """Return name, path, format and sizes of a source, and what was dropped, by reason."""
    return {
        "name": source.name,
        "path": source.config.path,
        "format": source.format,
        "rows": source.row_count,
        "examples": len(source),
        "dropped": {reason: count for reason, count in source.sampler.drop_counts.items() if count},
    }


def describe_lengths(lengths: np.ndarray, max_length: int) -> dict[str, Any]:
    """Return the number of texts, statistics of their lengths, and the maximum length, all in tokens.

    Args:
        lengths: Tokens of each text, int64 [N].
        max_length: Tokens after which a text is truncated.
    """
    return {
        "texts": len(lengths),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "most": int(lengths.max()),
        "max_length": max_length,
    }
