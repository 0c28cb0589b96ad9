"""Fixtures of the training tests."""

import pytest

from helpers.training_batches import open_letter_pairs
from jaxembed.data.sources import Source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A source of pairs whose texts share letters (`open_letter_pairs`)."""
    return open_letter_pairs(tmp_path_factory.mktemp("data"))
