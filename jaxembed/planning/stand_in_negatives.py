"""Stand-ins for the hard negatives that a stage will mine, so that a plan counts their texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxembed.data.sampling import ExampleSampler
from jaxembed.data.schema import Example, Row
from jaxembed.training.stage import Stage


class StandInSampler(ExampleSampler):
    """Draws from another sampler, with positives of other examples in place of the negatives to mine."""

    def __init__(self, sampler: ExampleSampler, max_mined: int):
        """Draw from `sampler`. A query gets at most `max_mined` negatives."""
        self.sampler, self.max_mined = sampler, max_mined
        self.max_positives, self.drop_counts = sampler.max_positives, sampler.drop_counts

    def __len__(self) -> int:
        return len(self.sampler)

    def draw(self, index: int, rng: np.random.Generator, max_negatives: int) -> Example:
        """Draw an example with as many negatives as mining may find for it."""
        count = min(max_negatives, self.max_mined)
        example = self.sampler.draw(index, rng, count)
        others = rng.integers(len(self), size=count - len(example.negatives))
        stand_ins = tuple(self.sampler.draw(int(i), rng, 0).positive for i in others)
        return dataclasses.replace(example, negatives=example.negatives + stand_ins, teacher_scores=())

    def iter_pairs(self, index: int, seed: int, max_texts: int | None) -> Iterator[Row]:
        """Yield the pairs of the other sampler."""
        return self.sampler.iter_pairs(index, seed, max_texts)


def add_stand_in_negatives(stage: Stage) -> Stage:
    """Return a stage with stand-ins for the negatives that it will mine. A stage without `mine` is returned unchanged."""
    mine = stage.config.mine
    if mine is None:
        return stage
    sources = [
        dataclasses.replace(source, sampler=StandInSampler(source.sampler, mine.negatives)) if stage.mines(source) else source
        for source in stage.sources
    ]
    return dataclasses.replace(
        stage, plan=stage.plan.with_sources(sources), batch_builder=stage.batch_builder.with_sources(sources)
    )
