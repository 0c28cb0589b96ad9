"""Similarities of the texts that a run was trained on: queries with their positives, hard negatives and random documents."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from jaxembed.config import MineConfig
from jaxembed.curation.remining import make_training_miner, open_mined_pairs
from jaxembed.data.batch import EncoderInput
from jaxembed.data.schema import Example
from jaxembed.data.sources import Source, open_sources
from jaxembed.errors import UserError
from jaxembed.files import cache_dir, exists
from jaxembed.formats.run_files import name_mined_pairs
from jaxembed.hub.embedder import Embedder
from jaxembed.reporting.held_out_views import (
    HARD_NEGATIVES,
    NEGATIVES_PER_QUERY,
    POSITIVES,
    RANDOM_NEGATIVES,
    SAMPLE_SEED,
    SetView,
    sample,
)
from jaxembed.reporting.run_files import RunFiles

log = logging.getLogger("jaxembed")

MAX_VIEWED_SOURCES = 4  # sources whose examples are encoded
MAX_SOURCE_EXAMPLES = 128  # examples of a source that are encoded


def open_training_sources(run: RunFiles) -> list[Source]:
    """Return the first sources of a run's last stage that have pairs, with the negatives that the run mined for them.

    If the training files are missing, the list is empty.
    """
    index, stage = len(run.config.stages) - 1, run.config.stages[-1]
    try:
        sources = open_sources(stage.data, cache_dir())
        sources = [
            _use_mined_pairs(source, stage.mine, name_mined_pairs(run.folder, index, number))
            for number, source in enumerate(sources)
        ]
    except UserError as error:
        log.info("%s: the report has no similarities of training rows (%s)", run.name, str(error).removesuffix("."))
        return []
    return [source for source in sources if source.is_mineable][:MAX_VIEWED_SOURCES]


def _use_mined_pairs(source: Source, mine: MineConfig | None, path: Path) -> Source:
    """Return a source with the pairs that were mined for it, if there are any."""
    return open_mined_pairs(source, path) if mine is not None and exists(path) else source


def view_training_source(source: Source, embedder: Embedder) -> SetView | None:
    """Encode a sample of a source's examples with the prompts of training. Return None if they have no hard negatives."""
    rng = np.random.default_rng(SAMPLE_SEED)
    numbers = sample(range(len(source)), MAX_SOURCE_EXAMPLES, rng)
    examples = [source.draw(number, rng, NEGATIVES_PER_QUERY) for number in numbers]
    if not any(example.negatives for example in examples):
        return None
    similarities = _compare_examples(examples, embedder, rng)
    return SetView(f"{source.name}: training rows", f"{len(examples):,} of {len(source):,} examples", (), similarities)


def _compare_examples(examples: list[Example], embedder: Embedder, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the cosines of queries with their positives, their hard negatives, and the positives of other queries."""
    encode = make_training_miner(embedder).encode
    queries = encode([EncoderInput(e.query, "query", e.instruction) for e in examples])
    positives = encode([EncoderInput(e.positive, "document", e.document_instruction) for e in examples])
    example_of_negative = [i for i, example in enumerate(examples) for _ in example.negatives]
    negatives = encode([EncoderInput(text, "document", e.document_instruction) for e in examples for text in e.negatives])
    others = [[i for i, other in enumerate(examples) if other.positive not in e.positives] for e in examples]
    pairs = [(i, j) for i, rows in enumerate(others) for j in sample(rows, NEGATIVES_PER_QUERY, rng)]
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    cosines = {
        POSITIVES: np.sum(queries * positives, axis=1),
        HARD_NEGATIVES: np.sum(queries[example_of_negative] * negatives, axis=1),
        RANDOM_NEGATIVES: np.sum(queries[first] * positives[second], axis=1),
    }
    return {kind: values for kind, values in cosines.items() if len(values)}
