"""The steps of a curation, one by one."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.curation import pair, queries_left, run_all_rows_step
from jaxembed.config.curation import (
    BalanceStepConfig,
    CleanStepConfig,
    DuplicatesStepConfig,
    FunctionStepConfig,
    LanguageStepConfig,
    NegativesStepConfig,
    QualityStepConfig,
)
from jaxembed.curation.minhash import NUM_HASHES, choose_hashes_per_band
from jaxembed.curation.steps.cleaning import collapse_whitespace, html_to_text, make_clean_step
from jaxembed.curation.steps.curated_row import CuratedRow, RowStepError, StepOutcome
from jaxembed.curation.steps.languages import make_language_step
from jaxembed.curation.steps.near_duplicates import hash_char_ngrams
from jaxembed.curation.steps.negatives import make_negatives_step
from jaxembed.curation.steps.quality import make_quality_step
from jaxembed.curation.steps.ratio_rules import (
    find_c4_problem,
    find_fineweb_problem,
    find_gopher_problem,
    find_repetition_problem,
)
from jaxembed.curation.steps.record_files import RecordFiles
from jaxembed.curation.steps.user_function import make_function_step
from jaxembed.errors import UserError

WORDS = [
    f"{start}{end}" for start in ("walk", "sun", "gar", "mel", "tor", "pin") for end in ("mar", "ten", "lop", "sif", "rud")
]
# Lines that end like sentences, of different words and some stop words.
SENTENCES = [f"{a} the {b} have {c} {d} to {a[::-1]}." for a, b, c, d in zip(*[iter(WORDS)] * 4, strict=False)]
SENTENCES += [f"{a} of {b} with {a[::-1]} {b[::-1]} and {a}ing." for a, b in zip(WORDS[::2], WORDS[1::2], strict=True)]
GOOD_PAGE = "\n".join(SENTENCES)


# clean


def test_cleaning_repairs_texts_and_reports_each_change() -> None:
    step = make_clean_step(CleanStepConfig(repair=True, html=True, unicode="NFC", boilerplate=("Share on \\w+",)))
    row = pair(
        "the cafÃ© at 5\u200b pm",
        "<p>A &amp; B</p><script>x()</script>\n<p>cafe\u0301</p>\nShare on Facebook",
        neg=["as it is"],
    )
    (outcome,) = step([row])
    assert outcome.row == {"query": "the café at 5 pm", "pos": ["A & B\ncafé"], "neg": ["as it is"]}
    assert {"query: changed by repair", "query: changed by control_chars", "positives: changed by html"} < set(outcome.reasons)
    assert {"positives: changed by unicode", "positives: changed by boilerplate"} < set(outcome.reasons)
    assert not [reason for reason in outcome.reasons if reason.startswith("negatives")]


def test_cleaning_drops_a_text_that_becomes_empty_with_its_score() -> None:
    step = make_clean_step(CleanStepConfig(html=True))
    row = pair("q", "<br>", "good", neg=["<p></p>"], pos_scores=[0.1, 0.9], neg_scores=[0.5])
    (outcome, without_query) = step([row, pair("<hr>", "good")])
    assert outcome.row == {"query": "q", "pos": ["good"], "neg": [], "pos_scores": [0.9], "neg_scores": []}
    assert without_query == StepOutcome(None, ("query: empty",))


@pytest.mark.parametrize(
    "text",
    ["List<String> names = a < b ? x : y;", "x &y; z", "👩‍💻 می‌خواهم", "def f():\n    return 1", "क्‍ष"],
)
def test_cleaning_leaves_code_emoji_and_joined_letters_alone(text: str) -> None:
    (outcome,) = make_clean_step(CleanStepConfig(html=True))([pair(text, "p")])
    assert outcome == StepOutcome({"query": text, "pos": ["p"], "neg": []})


def test_html_becomes_text() -> None:
    assert html_to_text("<ul><li>one<li>two</ul><b>bold</b> &lt;tag&gt;<style>p {}</style>") == "one\ntwo\nbold <tag>"
    assert html_to_text("a<br/>b<!-- hidden -->") == "a\nb"
    assert html_to_text("<head><title>t</title><body>text") == "text"
    assert [html_to_text(text) for text in ("x <![x]> y", "a <![ b", "<![foo bar")] == ["x  y", "a <![ b", "<![foo bar"]


def test_white_space_collapses_but_indentation_stays() -> None:
    assert collapse_whitespace("a \u00a0 b\r\n\n\n\n    c  d \n") == "a b\n\n    c d"


# quality


def test_quality_checks_lengths_symbols_patterns_and_metadata() -> None:
    config = QualityStepConfig(
        sides=("query", "positives", "negatives"), where={"lang": "en"}, min_chars=3, max_chars=30, max_symbols=0.3,
        drop_patterns=(r"\b\d{3}-\d{4}\b",),
    )  # fmt: skip
    rows = [
        pair("good one", "fine", "ab", neg=["x" * 31, "ok then"], lang="en"),
        pair("call 555-1234", "fine", lang="en"),
        pair("$$$ ### !!!", "fine", lang="en"),
        pair("good one", "ab", lang="en"),
        pair("good one", "fine", lang="de"),
    ]
    outcomes = make_quality_step(config)(rows)
    assert outcomes[0].row == {"query": "good one", "pos": ["fine"], "neg": ["ok then"], "lang": "en"}
    assert outcomes[0].reasons == ("positives: shorter than min_chars", "negatives: longer than max_chars")
    assert [outcome.reasons for outcome in outcomes[1:]] == [
        ("query: matches drop_patterns.0",), ("query: more symbols than max_symbols",), ("positives: shorter than min_chars",),
        ("where lang",),
    ]  # fmt: skip
    assert all(outcome.row is None for outcome in outcomes[1:])


def test_scored_pairs_and_labels_are_checked_as_a_whole() -> None:
    step = make_quality_step(QualityStepConfig(min_chars=3))
    scored = CuratedRow(0, 1, "scored_pairs", {"sentence1": "long enough", "sentence2": "no", "score": 4})
    label = CuratedRow(0, 1, "labels", {"text": "long enough", "label": "a"})
    assert step([scored, label]) == [StepOutcome(None, ("positives: shorter than min_chars",)), StepOutcome(label.fields)]


@pytest.mark.parametrize("find_problem", [find_gopher_problem, find_repetition_problem, find_c4_problem, find_fineweb_problem])
def test_a_page_of_sentences_passes_the_published_rules(find_problem: Any) -> None:
    assert find_problem(GOOD_PAGE) is None
    if find_problem in (find_repetition_problem, find_fineweb_problem):
        assert find_problem(GOOD_PAGE.replace("\n", "\n\n")) is None, "blank lines are no lines"


@pytest.mark.parametrize(
    ("find_problem", "text", "problem"),
    [
        (find_gopher_problem, "too few words", "gopher: number of words"),
        (find_gopher_problem, "ab " * 60, "gopher: word length"),
        (find_gopher_problem, GOOD_PAGE + " #" * 30, "gopher: symbols"),
        (find_gopher_problem, "\n".join(f"• {line}" for line in SENTENCES), "gopher: bullet points"),
        (find_gopher_problem, "\n".join(line[:-1] + "." * (i % 2 * 3) for i, line in enumerate(SENTENCES)), "gopher: lines that end in an ellipsis"),  # noqa: E501
        (find_gopher_problem, GOOD_PAGE + " 1234567" * 80, "gopher: words without letters"),
        (find_gopher_problem, " ".join(f"{word} {word[::-1]}" for word in WORDS * 2), "gopher: stop words"),
        (find_gopher_problem, "the " * 2 + " ".join(WORDS * 2), "gopher: stop words"),
        (find_fineweb_problem, "\n\n\n".join(f"{word} is a word." for word in WORDS), "fineweb: short lines"),
        (find_repetition_problem, f"{GOOD_PAGE}\n\n{GOOD_PAGE}", "gopher_repetition: paragraphs"),
        (find_repetition_problem, "\n".join(["the same line."] * 3 + ["another one."]), "gopher_repetition: lines"),
        (find_repetition_problem, "so good " * 20, "gopher_repetition: most frequent 2-gram"),
        (find_c4_problem, GOOD_PAGE + "\nLorem ipsum.", "c4: lorem ipsum"),
        (find_c4_problem, GOOD_PAGE + "\nif x {", "c4: curly bracket"),
        (find_c4_problem, "One two three. " * 4, "c4: number of sentences"),
        (find_c4_problem, "These sites use cookies.\n" * 6, "c4: number of sentences"),
        (find_fineweb_problem, GOOD_PAGE.replace(".", ""), "fineweb: lines that end like sentences"),
        (find_fineweb_problem, " \n", "fineweb: lines that end like sentences"),
        (find_fineweb_problem, "\n".join(f"{word} is a word." for word in WORDS), "fineweb: short lines"),
        (find_fineweb_problem, f"{GOOD_PAGE}\n{SENTENCES[0]}", "fineweb: repeated lines"),
    ],
)  # fmt: skip
def test_published_rules_name_what_is_wrong(find_problem: Any, text: str, problem: str) -> None:
    assert find_problem(text) == problem


# language

GERMAN, ENGLISH, CHINESE = (
    "Wie ändere ich die PIN meiner Karte?",
    "How do I change the PIN of my card?",
    "我如何更改银行卡的密码",
)


def test_texts_in_other_languages_are_dropped_and_doubtful_ones_kept() -> None:
    rows = [pair(ENGLISH, ENGLISH, GERMAN), pair(GERMAN, ENGLISH), pair(CHINESE, ENGLISH), pair("refund", "ok")]
    outcomes = make_language_step(LanguageStepConfig(languages=("en",)))(rows)
    assert queries_left(outcomes) == [ENGLISH, "refund"]
    assert [outcome.reasons for outcome in outcomes] == [("positives: in de",), ("query: in de",), ("query: in zh",), ()]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"pairs": "same"}, [ENGLISH]),
        ({"pairs": "different"}, [GERMAN, CHINESE]),
        ({"language_pairs": [["de", "en"]]}, [GERMAN]),
    ],
)
def test_pairs_of_two_languages_are_kept_by_rule(rule: dict[str, Any], left: list[str]) -> None:
    rows = [pair(ENGLISH, ENGLISH + " Tell me please."), pair(GERMAN, ENGLISH), pair(CHINESE, ENGLISH)]
    assert queries_left(make_language_step(LanguageStepConfig(**rule))(rows)) == left


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown language 'eng' \(expected .*\ben\b"):
        make_language_step(LanguageStepConfig(languages=("eng",)))


# duplicates


def test_exact_duplicates_of_pairs_queries_and_positives(tmp_path: Path) -> None:
    rows = [pair("How?", "so", "thus"), pair("how? ", "So"), pair("How?", "other"), pair("Why?", "so")]
    left = {}
    for of in ("pairs", "queries", "positives"):
        folder = tmp_path / of
        outcomes = run_all_rows_step(DuplicatesStepConfig(of=of), folder, rows)
        left[of] = [[outcome.row["query"], *outcome.row["pos"]] for outcome in outcomes if outcome.row]
    assert sorted(map(len, left["pairs"])) == [2, 2, 3] or sorted(map(len, left["pairs"])) == [2, 2, 2, 2]
    assert left["queries"] == [["How?", "so", "thus"], ["Why?", "so"]]
    assert sorted(text.lower() for _, *texts in left["positives"] for text in texts) == ["other", "so", "thus"]
    split = [pair("new york", "city guide"), pair("new", "york city guide")]
    assert all(outcome.row for outcome in run_all_rows_step(DuplicatesStepConfig(), tmp_path / "split", split))


def test_the_kept_copy_follows_the_rules(tmp_path: Path) -> None:
    rows = [
        pair("q", "p", source=1, neg=["a", "b"]), pair("q", "a longer positive", source=1), pair("q", "p", source=0, neg=["a"]),
    ]  # fmt: skip
    kept = {}
    for rules in (("most_negatives",), ("longest",), ("source_priority",), ("source_priority", "longest")):
        folder = tmp_path / "-".join(rules)
        outcomes = run_all_rows_step(DuplicatesStepConfig(of="queries", keep=rules), folder, rows)
        kept[rules[0]] = [i for i, outcome in enumerate(outcomes) if outcome.row is not None]
    assert kept == {"most_negatives": [0], "longest": [1], "source_priority": [2]}


def test_copies_in_other_sources_stay_if_asked(tmp_path: Path) -> None:
    rows = [pair("q", "p", source=0), pair("q", "p", source=1), pair("q", "p", source=1)]
    for match in ("exact", "near"):
        folder = tmp_path / match
        outcomes = run_all_rows_step(DuplicatesStepConfig(match=match, across_sources=False), folder, rows)
        assert [rows[i].source for i, outcome in enumerate(outcomes) if outcome.row is not None] == [0, 1]


NEAR = {
    "english": (
        "The committee approved the new budget for the coming year on Friday",
        "The committee has approved the new budget for the coming year on Friday",
    ),
    "code": ("def add(first, second):\n    return first + second", "def add(first, second):\n    return first + second  # sum"),
    "chinese": ("今天的天气非常好我们一起去公园散步吧", "今天的天气非常好我们一起去公园散步"),
    "thai": ("วันนี้อากาศดีมากเราไปเดินเล่นในสวนกันเถอะ", "วันนี้อากาศดีมากเราไปเดินเล่นในสวนกันนะ"),
}  # fmt: skip
UNLIKE = ["The parliament rejected a proposal to raise taxes", "def total(values):\n    return sum(values) / len(values)",
          "昨天股市大幅下跌投资者损失惨重", "พรุ่งนี้ฝนจะตกหนักทั่วประเทศ"]  # fmt: skip


def test_near_duplicates_are_found_in_all_scripts(tmp_path: Path) -> None:
    texts = [text for texts in NEAR.values() for text in texts] + UNLIKE
    rows = [pair(text, "p") for text in texts]
    left = queries_left(run_all_rows_step(DuplicatesStepConfig(of="queries", match="near", threshold=0.7), tmp_path, rows))
    assert set(UNLIKE) < set(left)
    assert [len(set(left) & set(texts)) for texts in NEAR.values()] == [1, 1, 1, 1]


def test_the_kept_rows_do_not_depend_on_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = ["".join(rng.choice(list("abcdefghij   "), 60)) for _ in range(20)]
    rows = [pair(f"{text} {suffix}", "p") for text in base for suffix in ("", "now", "then", "")]
    results = set()
    for trial in range(4):
        for match in ("near", "exact"):
            folder = tmp_path / f"{match}{trial}"
            order = rng.permutation(len(rows))
            outcomes = run_all_rows_step(DuplicatesStepConfig(of="queries", match=match), folder, [rows[i] for i in order])
            results.add((match, tuple(sorted(queries_left(outcomes)))))
    assert {match: len(left) for match, left in results} == {"near": 20, "exact": 60}
    assert len(results) == 2


def test_a_band_finds_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.95):
        width = choose_hashes_per_band(threshold)
        assert 1 - (1 - threshold**width) ** (NUM_HASHES // width) >= 0.99
    assert choose_hashes_per_band(0.8) > choose_hashes_per_band(0.6)


def test_the_ngrams_of_a_text_are_those_of_its_characters() -> None:
    texts = ["abcdefgh", "aaaaaaaa", "今天天气很好", "ab", "AB ", "\u200b"]
    ngrams = hash_char_ngrams(texts)
    assert list(map(len, ngrams)) == [4, 4, 4, 1, 1, 1]  # shorter n-grams in scripts without spaces and in short texts
    assert len(set(ngrams[1])) == 1 and ngrams[3] == ngrams[4]
    assert all(np.array_equal(hash_char_ngrams([text])[0], alone) for text, alone in zip(texts, ngrams, strict=True))


def test_records_are_divided_by_key_and_read_in_ascending_ranges(tmp_path: Path) -> None:
    dtype = np.dtype([("key", "<u8"), ("item", "<u8")])
    keys = np.random.default_rng(0).integers(2**64, size=200_000, dtype=np.uint64)
    files = RecordFiles(tmp_path, dtype, len(keys), 1)
    for part in np.array_split(np.rec.fromarrays([keys, np.arange(len(keys))], dtype=dtype), 7):
        files.append(part)
    partitions = list(files.iter_partitions())
    assert len(partitions) > 4 and max(map(len, partitions)) * dtype.itemsize < 2**20
    assert all(a["key"].max() < b["key"].min() for a, b in pairwise(partitions))
    assert sorted(np.concatenate(partitions)["item"].tolist()) == list(range(len(keys)))
    assert list(tmp_path.iterdir()) == []


# balance


def test_groups_are_limited_by_a_draw_that_the_seed_decides(tmp_path: Path) -> None:
    rows = [pair(f"q{i}", "p", source=i % 2, topic="rare" if i < 3 else "common") for i in range(40)]
    by_source = run_all_rows_step(BalanceStepConfig(max_rows=5), tmp_path / "a", rows)
    assert [sum(o.row is not None and r.source == s for r, o in zip(rows, by_source, strict=True)) for s in (0, 1)] == [5, 5]
    by_topic = queries_left(run_all_rows_step(BalanceStepConfig(by="topic", max_rows=5), tmp_path / "b", rows))
    assert {"q0", "q1", "q2"} < set(by_topic) and len(by_topic) == 8
    reversed_order = queries_left(run_all_rows_step(BalanceStepConfig(by="topic", max_rows=5), tmp_path / "c", rows[::-1]))
    assert set(reversed_order) == set(by_topic)
    assert set(queries_left(run_all_rows_step(BalanceStepConfig(by="topic", max_rows=5), tmp_path / "d", rows, 1))) != set(
        by_topic
    )
    assert 8 < len(queries_left(run_all_rows_step(BalanceStepConfig(share=0.5), tmp_path / "e", rows))) < 32


def test_a_group_field_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"balance by topik: no row has this field \(the first row has query, pos, neg"):
        run_all_rows_step(BalanceStepConfig(by="topik", max_rows=5), tmp_path / "a", [pair("q", "p")])


# function


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_curation_rules.py").write_text(
        "def edit(row):\n"
        "    if row['query'] == 'bad':\n"
        "        raise KeyError('no such key')\n"
        "    row['pos'].append('more')\n"
        "    return None if row['query'] == 'drop' else row\n"
        "def break_row(row):\n"
        "    return {'query': 5}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_curation_rules"
    sys.modules.pop("my_curation_rules", None)


def test_a_function_edits_and_drops_rows(user_module: str) -> None:
    step, _ = make_function_step(FunctionStepConfig(function=f"{user_module}.edit"))
    rows = [pair("q", "p"), pair("drop", "p")]
    edited, dropped = step(rows)
    assert edited == StepOutcome({"query": "q", "pos": ["p", "more"], "neg": []}, ("changed",))
    assert dropped == StepOutcome(None, ("dropped",)) and rows[0].fields["pos"] == ["p"]


def test_a_function_that_fails_stops_drops_or_keeps(user_module: str) -> None:
    row = CuratedRow(0, 17, "pairs", {"query": "bad", "pos": ["p"]})
    config = FunctionStepConfig(function=f"{user_module}.edit")
    with pytest.raises(RowStepError) as error:
        make_function_step(config).function([row])
    assert error.value.row == row
    assert error.value.problem.startswith("my_curation_rules.edit failed (KeyError: 'no such key'). Correct it")
    for on_error, left in (("drop", None), ("keep", row.fields)):
        step, _ = make_function_step(config.replace(on_error=on_error))
        assert step([row]) == [StepOutcome(left, ("failed with KeyError",))]
    with pytest.raises(RowStepError, match='returned a row that is not valid: "query" is 5'):
        make_function_step(FunctionStepConfig(function=f"{user_module}.break_row")).function([row])


@pytest.mark.parametrize(
    ("path", "message"),
    [("no_such_module.f", "cannot be imported"), ("json.no_such_function", "json has no function no_such_function")],
)
def test_a_function_that_does_not_exist_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_function_step(FunctionStepConfig(function=path))


def test_tokens_are_those_of_a_model(tmp_path: Path) -> None:
    from helpers import tiny

    tiny.write_folder(tmp_path / "model", "qwen3")
    step = make_quality_step(QualityStepConfig(tokenizer=str(tmp_path / "model"), min_tokens=2, max_tokens=9))
    outcomes = step([pair("a b c", "d e f"), pair("a", "d e f"), pair("a b c", "d e f " * 20)])
    assert [outcome.reasons for outcome in outcomes] == [
        (), ("query: shorter than min_tokens",), ("positives: longer than max_tokens",)
    ]  # fmt: skip


# negatives


def test_false_and_superfluous_negatives_are_dropped() -> None:
    step = make_negatives_step(NegativesStepConfig(answer_field="answer", max_negatives=2, min_negatives=1))
    rows = [
        pair("Q?", "The fox", neg=["the  FOX", "a", "q?", "A ", "b", "c"], neg_scores=[1, 2, 3, 4, 5, 6], pos_scores=[9]),
        pair("Q?", "p", neg=["It was 1984.", "in 19845", "see A. B. Smith", "abc"], answer=[1984, "a b smith"]),
        pair("Q?", "p", neg=["p"]),
        pair("Q?", "p"),
        CuratedRow(0, 1, "text", {"text": "t"}),
    ]
    outcomes = step(rows)
    assert outcomes[0].row == rows[0].fields | {"neg": ["a", "b"], "neg_scores": [2, 5]}
    assert len(outcomes[0].reasons) == 4 and outcomes[0].reasons[-1] == "negatives: beyond max_negatives"
    assert outcomes[1].row is not None and outcomes[1].row["neg"] == ["in 19845", "abc"]
    assert outcomes[1].reasons == ("negatives: contains the answer",) * 2
    assert outcomes[2:4] == [StepOutcome(None, ("negatives: fewer than min_negatives",))] * 2
    assert outcomes[4] == StepOutcome({"text": "t"})
