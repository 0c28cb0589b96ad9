"""What a run prints about its data: a bounded number of lines, and a warning where nothing can be learned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxembed.config import CosineRegressionConfig, InfoNCEConfig
from jaxembed.data.schema import Example
from jaxembed.errors import UserError
from jaxembed.runs import report


def make_example(query: str, positive: str, negatives: int = 0) -> Example:
    return Example(query, positive, tuple(f"n{i}" for i in range(negatives)), (positive,))


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([make_example("q", "p")], True),
        ([make_example("q", "p"), make_example("r", "s")], True),
        ([make_example("q", "p"), make_example("Q ", "s")], False),
        ([make_example("q", "p"), make_example("r", "P\n")], False),
        ([make_example("q", "p", 1), make_example("q", "p")], True),
    ],
)
def test_equal_texts_leave_no_negatives(examples: list[Example], expected: bool) -> None:
    assert report.have_negatives(examples) == expected


class FakeSource:
    """Two examples with in-batch negatives, and a count of dropped rows."""

    name, format, in_batch, row_count = "s", "pairs", True, 5
    config = SimpleNamespace(few_shot=None, path="s.jsonl", graded=None)
    sampler = SimpleNamespace(drop_counts={"odd": 3})

    def __len__(self) -> int:
        return 2


class FakeSampler:
    """Draws examples with many negatives, and lists their texts without prompts."""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    def sample(self, step: int, ids: np.ndarray) -> list[Example]:
        return self.examples

    def list_texts(self, examples: list[Example]) -> tuple[list[str], list[str]]:
        texts = [text for e in examples for text in (e.query, e.positive, *e.negatives)]
        return texts, [""] * len(texts)


def make_stage(
    sources: int, examples: list[Example], batch_size: int = 2, objectives: tuple[Any, ...] = (InfoNCEConfig(),)
) -> Any:
    tokenizer = SimpleNamespace(
        spec=SimpleNamespace(max_length=8),
        count_untruncated_tokens=lambda texts, prompts: np.ones(len(texts)),
        decode_inputs=lambda texts, prompts: [("", text, 1) for text in texts],
    )
    settings = SimpleNamespace(
        train=SimpleNamespace(steps=1, batch_size=batch_size),
        data=SimpleNamespace(hard_negatives=0),
        objectives=objectives,
    )
    return SimpleNamespace(
        sources=[FakeSource()] * sources, config=settings, tokenizer=tokenizer,
        plan=SimpleNamespace(count_epochs=lambda steps: [1.0] * sources),
        batch_builder=SimpleNamespace(sampler=FakeSampler(examples), token_builders={}),
        list_objectives=lambda source: [o for o in objectives if not o.sources or source.name in o.sources],
        needs_hard_negatives=lambda source: False, needs_teacher_scores=lambda source: False,
    )  # fmt: skip


def test_many_sources_and_negatives_print_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jaxembed")
    examples = [make_example("q", "p", 1024), make_example("r", "s", 1024)]
    report.show_data(make_stage(400, examples))
    assert len(caplog.messages) < 2 * 400 + 600
    assert "examples of 380 more sources are not shown; see `python -m jaxembed.data preview`" in caplog.messages
    assert "  and 1016 more negatives" in caplog.messages and "  dropped: 3 (odd)" in caplog.messages


def test_data_without_a_training_signal_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    report.show_data(make_stage(1, [make_example("q", "p"), make_example("q", "p")], batch_size=1))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and "they train at loss 0" in warnings[0] and "its loss is 0" in warnings[1]


def test_warnings_about_negatives_are_for_infonce(caplog: pytest.LogCaptureFixture) -> None:
    stage = make_stage(1, [make_example("q", "p"), make_example("q", "p")], 1, (CosineRegressionConfig(),))
    stage.sources[0].config = SimpleNamespace(**vars(FakeSource.config) | {"graded": True})
    report.show_data(stage)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        (InfoNCEConfig(sources=("other",)), "no objective: all of them name other sources"),
        (CosineRegressionConfig(), "no graded pairs, which all its objectives need"),
    ],
)
def test_data_that_no_objective_trains_on_is_refused_with_the_reason(objective: Any, problem: str) -> None:
    examples = [make_example("q", "p", 1), make_example("r", "s", 1)]
    with pytest.raises(UserError, match=f"^nothing to train on: s has {problem}"):
        report.show_data(make_stage(1, examples, objectives=(objective,)))
