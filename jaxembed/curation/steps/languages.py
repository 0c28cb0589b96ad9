"""The step `language`: drops texts and pairs in other languages. The model ships with py3langid."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxembed.config.curation import LanguageStepConfig, Side
from jaxembed.config.fields import quote_value
from jaxembed.curation.steps.curated_row import CuratedRow, RowStep, StepOutcome, drop_texts, get_texts
from jaxembed.errors import UserError

MAX_JUDGED_CHARS = 2000  # the language is identified from this many characters
DOCUMENT_SIDES: tuple[Side, ...] = ("positives", "negatives")

IdentifyLanguage = Callable[[str], str | None]  # the language of a text, or None if it is not certain


def make_language_step(config: LanguageStepConfig) -> RowStep:
    """Return the step. Raise `UserError` if py3langid is not installed, or does not know a language."""
    identify = open_identifier(config)

    def check(rows: Sequence[CuratedRow]) -> list[StepOutcome]:
        return [drop_texts(row, find_language_problems(row, config, identify)) for row in rows]

    return check


def find_language_problems(
    curated: CuratedRow, config: LanguageStepConfig, identify: IdentifyLanguage
) -> dict[Side, list[str | None]]:
    """Return why each text of a row is dropped, or None. Texts without a certain language are kept."""
    found = {side: [identify(text) for text in get_texts(curated, side)] for side in config.sides}
    problems: dict[Side, list[str | None]] = {
        side: [f"in {language}" if language and config.languages and language not in config.languages else None
               for language in languages]
        for side, languages in found.items()
    }  # fmt: skip
    if config.pairs == "any" and not config.language_pairs:
        return problems
    query_language = found["query"][0] if "query" in found else identify(get_texts(curated, "query")[0])
    for side in DOCUMENT_SIDES:
        for i, language in enumerate(found.get(side, ())):
            if query_language and language:
                problems[side][i] = problems[side][i] or find_pair_problem(query_language, language, config)
    return problems


def find_pair_problem(query_language: str, language: str, config: LanguageStepConfig) -> str | None:
    """Return why a document is dropped because of its own language and that of its query, or None."""
    is_listed = not config.language_pairs or (query_language, language) in config.language_pairs
    is_allowed = config.pairs == "any" or (query_language == language) == (config.pairs == "same")
    return None if is_listed and is_allowed else f"in {language}, for a query in {query_language}"


@functools.cache
def load_identifier() -> tuple[Any, list[str]]:
    """Return py3langid's identifier and its languages."""
    try:
        from py3langid import langid
    except ImportError:
        raise UserError("language: py3langid is not installed. Run pip install '.[curate]'.") from None
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    # Longer codes are varieties such as Nigerian Pidgin, which the model confuses with English headlines.
    labels = [label for label in identifier.labels if len(label) == 2]
    identifier.set_languages(labels)
    return identifier, labels


def open_identifier(config: LanguageStepConfig) -> IdentifyLanguage:
    """Return a function that identifies the language of a text, as an ISO 639-1 code."""
    identifier, labels = load_identifier()
    for language in (*config.languages, *(language for pair in config.language_pairs for language in pair)):
        if language not in labels:
            nearest = difflib.get_close_matches(language, labels, n=3, cutoff=0.3)
            expected = " or ".join(sorted(nearest)) or "an ISO 639-1 code such as en or zh"
            raise UserError(f"language: unknown language {quote_value(language)} (expected {expected})")

    def identify(text: str) -> str | None:
        if len(text.encode()) < config.min_bytes:
            return None
        language, probability = identifier.classify(text[:MAX_JUDGED_CHARS])
        return str(language) if probability >= config.min_confidence else None

    return identify
