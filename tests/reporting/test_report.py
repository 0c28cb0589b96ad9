"""A report says what its runs and scores say, fetches nothing, escapes every text, and refuses bad input in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helpers.reports import HOSTILE, TOPICS, write_report
from jaxembed.errors import UserError
from jaxembed.hub.embedder import Embedder
from jaxembed.reporting.blocks import Collapsible, ReportSection, Table
from jaxembed.reporting.charts import average_points, draw_points
from jaxembed.reporting.held_out_views import EncodedTexts as Source
from jaxembed.reporting.held_out_views import compare_pairs, compute_latent_attention, describe_query, project_texts
from jaxembed.reporting.page import render_page, to_script_json
from jaxembed.reporting.run_files import read_run_files
from jaxembed.training.metrics import read_metrics

MAX_BYTES = 6_000_000
REFERENCES = {"src", "href", "srcset", "action", "data", "poster"}  # attributes that may fetch something


class Page(HTMLParser):
    """The elements of a page, the texts of its cells, and its JSON scripts."""

    def __init__(self, content: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: dict[str, Any] = {}
        self._script: str | None = None
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.data[self._script] = json.loads(data)
            self._script = None
        else:
            self.texts.append(data.strip())

    def rows(self, first_cell: str) -> list[str]:
        """Return the texts that follow a cell."""
        return [text for text in self.texts[self.texts.index(first_cell) :] if text]


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


# The page of a run


def test_a_run_directory_alone_gives_every_section(report: Any) -> None:
    sections = ["summary", "training", "held-out", "map", "neighbors", "similarities", "latents", "data", "setup"]
    assert report.result["sections"] == sections
    assert report.result["bytes"] == report.path.stat().st_size < MAX_BYTES
    page = read_page(report.path)
    ids = [attributes.get("id") for tag, attributes in page.elements if tag == "section"]
    anchors = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert ids == sections and anchors == [f"#{id_}" for id_ in sections]
    places = [attributes["data-chart"] for _, attributes in page.elements if "data-chart" in attributes]
    assert places == [str(i) for i in range(len(page.data["chart-data"]))]


def test_the_page_loads_nothing_and_executes_no_text(report: Any) -> None:
    page = read_page(report.path)
    found = [
        (tag, name, value) for tag, attributes in page.elements for name, value in attributes.items() if name in REFERENCES
    ]
    assert all(tag == "a" and str(value).startswith("#") for tag, _, value in found)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "link", "iframe", "object", "embed", "b"})
    policy = next(attributes for _, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; ")
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 4
    assert "<b>faq</b>" in page.texts  # the name of a source


def test_hostile_texts_are_shown_literally(report: Any) -> None:
    (browsed,) = read_page(report.path).data["neighbor-data"]
    texts = {*browsed["documents"].values(), *(query["text"] for query in browsed["queries"])}
    assert {*HOSTILE, *(f"about {text}" for text in HOSTILE)} <= texts
    assert "window.attacked" not in re.sub(r"(?s)<script type=\"application/json\".*?</script>", "", report.path.read_text())


def test_ranks_agree_with_the_scores_of_training(report: Any) -> None:
    (browsed,) = read_page(report.path).data["neighbor-data"]
    ranks = np.array([query["rank"] for query in browsed["queries"]])
    assert len(ranks) == len(HOSTILE) + len(TOPICS)
    scores = [row for row in read_metrics(report.run) if "eval/faq/ndcg_at_10" in row]
    best = max(scores, key=lambda row: row["eval/faq/ndcg_at_10"])
    assert np.mean(ranks <= 10) == pytest.approx(best["eval/faq/recall_at_10"])
    assert np.mean(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)) == pytest.approx(best["eval/faq/ndcg_at_10"])
    for query in browsed["queries"]:
        relevant = [n["rank"] for n in query["neighbors"] if n["relevant"]]
        assert relevant == [query["rank"]]
        assert [n["score"] for n in query["neighbors"]] == sorted((n["score"] for n in query["neighbors"]), reverse=True)


def test_charts_hold_the_metrics_of_the_run(report: Any) -> None:
    page = read_page(report.path)
    tables = [spec["datasets"]["table"] for spec in page.data["chart-data"]]
    losses = {(row["x"], row["series"]): row["value"] for row in tables[0]}
    rows = [row for row in read_metrics(report.run) if "loss" in row]
    assert losses == {
        (row["step"], series): row[key]
        for row in rows
        for key, series in (("loss", "loss"), ("infonce", "infonce"), ("infonce_16", "infonce, width 16"))
    }
    bm25 = next(row for row in read_metrics(report.run) if "bm25/faq/ndcg_at_10" in row)
    held_out = next(t for t in tables if any(row.get("series") == "BM25" for row in t))
    assert {row["value"] for row in held_out if row["series"] == "BM25"} == {bm25["bm25/faq/ndcg_at_10"]}
    assert {row["baseline"] for row in held_out if row["series"] == "trained"} == {False}
    lengths = next(t for t in tables if any(row.get("kind") == "<b>faq</b>" for row in t))
    assert sum(row["share"] for row in lengths) == pytest.approx(1)


def test_setup_has_config_hashes_versions_and_command(report: Any) -> None:
    page = read_page(report.path)
    (source,) = json.loads((report.run / "data_hashes.json").read_text()).values()
    assert {source, "pairs.jsonl", "python -m jaxembed.train tiny.yaml", "flax"} <= set(page.texts)
    config = next(text for text in page.texts if text.startswith("run:"))
    assert "latents: 8" in config and str(report.run.parent) not in report.path.read_text()


def test_without_the_model_no_weights_are_read(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedder, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    result = write_report(run, tmp_path / "out.html", "--no-model")
    assert result["sections"] == ["summary", "training", "held-out", "data", "setup"]


def test_a_run_of_an_earlier_version_has_a_report(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "old")
    for name in ("data.json", "starts.jsonl"):
        (tmp_path / "old" / name).unlink()
    result = write_report(tmp_path / "old", tmp_path / "out.html", "--no-model")
    assert result["sections"] == ["summary", "training", "held-out", "setup"]


# Scores of several models


def write_scores(folder: Path, **scores: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def test_models_are_compared_on_the_tasks_that_they_share(tmp_path: Path) -> None:
    widths = {"16": 0.3, "32": 0.4}
    small = {"A": {"score": 0.4, "type": "STS", "metric": "cosine_spearman", "widths": widths}, "B": {"score": 0.2}}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "scores.json").write_text(json.dumps({"model": "small", "scores": small}))
    big = write_scores(tmp_path / "big", A={"score": 0.6, "type": "STS"}, B={"score": 0.6}, C={"score": None})
    result = write_report(tmp_path / "small", big / "scores.json", tmp_path / "out.html")
    assert (result["models"], result["sections"]) == (["small", "big"], ["summary", "benchmark", "widths"])
    page = read_page(tmp_path / "out.html")
    assert page.rows("small")[:6] == ["small", "–", "–", "–", "–", "30.00"]
    assert page.rows("big")[5:7] == ["60.00", "+100.0 %"]
    assert page.rows("STS (1)")[1:][:3] == ["mean", "40.00", "60.00"]
    assert page.rows("C")[1:4] == ["–", "–", "–"]
    assert page.rows("All (3)")[1:4] == ["mean", "–", "–"]
    assert page.rows("kept")[1:3] == ["75.0 %", "100.0 %"]


def test_other_results_of_evaluate_are_shown(tmp_path: Path) -> None:
    bm25 = {"metric": "ndcg_at_10", "bm25": {"recall_at_10": 0.9, "ndcg_at_10": 0.375}}
    folder = write_scores(tmp_path / "own", A={"score": 0.5, "type": "Retrieval", **bm25}, B={"score": 0.25})
    found = {"difference": 0.125, "interval": [0.02, 0.2], "p": 0.0125, "verdict": "better", "queries": 9}
    unknown = {"difference": None, "no_interval": "mteb gives no results by item"}
    comparison = {
        "model": "/home/me/base", "scores": {"A": {"score": 0.375}, "B": {"score": None}}, "mean": found,
        "differences": {"A": found, "B": unknown}, "conclusion": "/home/me/own is better than /home/me/base on A.",
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(comparison))
    (folder / "leaks.json").write_text(json.dumps({"A": {"texts": 1200, "exact": 3, "ngram": 40}}))
    result = write_report(folder, tmp_path / "out.html")
    assert result["sections"] == ["summary", "benchmark", "comparison", "leaks"]
    page = read_page(tmp_path / "out.html")
    assert "own is better than base on A." in page.texts and "/home/me" not in (tmp_path / "out.html").read_text()
    assert page.rows("BM25")[1:9] == ["Retrieval (1)", "mean", "50.00", "37.50", "A", "ndcg_at_10", "50.00", "37.50"]
    assert page.rows("All (2)")[1:4] == ["mean", "37.50", "–"]
    cells = page.rows("Paired bootstrap over the items of each task. Scores × 100.")
    interval = ["+12.50", "+2.00 to +20.00", "0.0125", "better"]
    assert cells[8:15] == ["A", "50.00", "37.50", *interval]
    assert cells[15:22] == ["B", "25.00", "–", "–", "–", "–", "mteb gives no results by item"]
    assert cells[22:29] == ["mean", "–", "–", *interval]
    assert page.rows("share an n-gram only")[1:6] == ["A", "own", "1,200", "3", "40"]


def test_scores_in_a_run_directory_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "own", ignore=shutil.ignore_patterns("checkpoints"))
    folder = write_scores(tmp_path / "own" / "mteb", A={"score": 0.5, "type": "STS"})
    for inputs in ([tmp_path / "own"], [folder, tmp_path / "own"]):
        result = write_report(*inputs, tmp_path / "out.html", "--no-model")
        assert (result["models"], "benchmark" in result["sections"]) == (["own"], True)
    assert write_report(folder, tmp_path / "out.html")["models"] == ["own"]
    for model, is_own in (("organization/other", False), (str(tmp_path), False), (str(tmp_path / "moved"), True)):
        (folder / "model.json").write_text(json.dumps({"model": model}))
        assert (read_run_files(tmp_path / "own").benchmark is not None) == is_own


def test_runs_with_the_same_name_are_distinguished(run: Path, tmp_path: Path) -> None:
    for name in ("copy", "tiny"):
        shutil.copytree(run, tmp_path / name)
    result = write_report(run, tmp_path / "copy", tmp_path / "tiny", tmp_path / "out.html", "--no-model")
    assert result["models"] == ["tiny", "copy", "tiny (2)"]
    loss, *parts = read_page(tmp_path / "out.html").data["chart-data"][:3]
    assert {row["series"] for row in loss["datasets"]["table"]} == {"tiny", "copy", "tiny (2)"}
    rows = [row for row in read_metrics(run) if "loss" in row]
    for spec, key in zip(parts, ("infonce", "infonce_16"), strict=True):
        values = [(row["series"], row["value"]) for row in spec["datasets"]["table"]]
        assert values == [(name, row[key]) for name in result["models"] for row in rows]


@pytest.mark.parametrize("has_model_file", [True, False])
def test_scores_of_a_run_belong_to_it_and_its_size_is_shown(run: Path, tmp_path: Path, has_model_file: bool) -> None:
    tasks = {"A": {"score": 0.5, "type": "STS"}}
    scores = write_scores(tmp_path / "mteb", **(tasks if has_model_file else {"model": str(run), "scores": tasks}))
    if has_model_file:
        (scores / "model.json").write_text(json.dumps({"model": str(run)}))
    other = write_scores(tmp_path / "other" / "mteb", A={"score": 0.25})
    (other / "model.json").write_text(json.dumps({"model": "organization/other"}))
    result = write_report(run, scores, other, tmp_path / "out.html", "--no-model", "--baseline", "other")
    assert result["models"] == ["tiny", "other"]
    page = read_page(tmp_path / "out.html")
    assert f"python -m jaxembed.report {run.name} mteb mteb out.html --no-model --baseline other" in page.texts
    cells = page.rows("tiny")[1:7]
    parameters = sum(x.size for x in jax.tree.leaves(Embedder.load(run).params))
    assert cells[0] == f"{parameters / 1e6:.3f}" and cells[2:] == ["32", "48", "50.00", "+100.0 %"]


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [f / "rnu", f / "o.html"], r"rnu: no such file or folder\. Did you mean .*run\?$"),
        (lambda f: [f / "empty", f / "o.html"], r"empty: neither a run directory nor scores \(expected base\.json, or scores"),
        (lambda f: [f / "early", f / "o.html"], r"early: a run that has not started yet .*\. Train it first\.$"),
        (lambda f: [f / "run", f / "o.html"], r"run: has no metrics yet\. Train it until it logs a step"),
        (lambda f: [f / "odd.json", f / "o.html"], r"odd\.json: task is not the score of a task \(expected a file that"),
        (lambda f: [f / "text.json", f / "o.html"], r"text\.json: A: the score is 'high' \(expected a number, or"),
        (lambda f: [f / "bm25.json", f / "o.html"], r"bm25\.json: A: bm25 is 0\.5 \(expected scores by metric, such as"),
        (lambda f: [f / "run", f / "run"], r"run: expected a page that ends in \.html or \.htm\. Name it last"),
        (lambda f: [f / "good.json", f / "page.html"], r"page\.html: is a folder \(expected a page to write\)\."),
        (lambda f: [f / "good.json", f / "odd.json" / "o.html"], r"o\.html: its folder cannot be created"),
        (lambda f: [f / "good.json", f / "o.html", "--baseline", "gud"], r"--baseline: no model of the report is named 'gud'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run: Path, tmp_path: Path, make: Callable[[Path], list[Any]], message: str) -> None:
    for name in ("empty", "early", "run", "page.html"):
        (tmp_path / name).mkdir()
    for name in ("base.json", "config.yaml"):
        shutil.copy(run / name, tmp_path / "run")
    shutil.copy(run / "config.yaml", tmp_path / "early")
    (tmp_path / "odd.json").write_text('{"task": 3}')
    (tmp_path / "text.json").write_text('{"A": {"score": "high"}}')
    (tmp_path / "bm25.json").write_text('{"A": {"score": 0.5, "bm25": 0.5}}')
    (tmp_path / "good.json").write_text('{"A": {"score": 0.5}}')
    with pytest.raises(UserError, match=message):
        write_report(*make(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.json",
            "{",
            r"data\.json: not valid JSON \(.*\)\. This file of the run is damaged: restore it, or train again\.$",
        ),
        ("data.json", "[3]", r"data\.json: expected a list of sources for each stage\. This file of the run is damaged"),
        (
            "starts.jsonl",
            "{}\nx\n",
            r"starts\.jsonl:2: not a JSON object\. This file of the run is damaged: remove the line\.$",
        ),
        ("config.yaml", "a: [", r"config\.yaml: not valid YAML .* This file of the run is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_one_line(run: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / "run", tmp_path / "o.html")


def test_missing_packages_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "altair" else find_spec(name, *rest))
    with pytest.raises(UserError, match=r"^report: altair is not installed\. Run pip install '\.\[report\]'\.$"):
        write_report(tmp_path, tmp_path / "o.html")


# Parts


def test_every_text_of_a_page_is_escaped() -> None:
    text = HOSTILE[0] + HOSTILE[1] + "\ud83d"
    chart = draw_points(text, [{"x": 0, "y": 0, "source": text, "text": text}], text)
    section = ReportSection(
        "s", text, text, [(text, text, text)], [chart], [Table([text], [[text]], caption=text)], [Collapsible(text, text)]
    )
    content = render_page(text, [section, ReportSection("empty", "empty")], text).decode()
    page = Page(content)
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == ["s"]
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "b"})
    assert page.data["chart-data"][0]["datasets"]["table"][0]["text"] == text
    shown = text.replace("\ud83d", "?")
    assert page.texts.count(shown) == 15 and "".join(page.texts).count(shown) == 16  # a column may break after a slash


def test_json_in_a_script_cannot_end_it_and_has_no_nan() -> None:
    assert to_script_json(["</script>&\u2028"]) == '["\\u003c/script\\u003e\\u0026\\u2028"]'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_script_json([float("nan")])


def test_long_lines_are_averaged_and_gaps_stay() -> None:
    rows = [{"x": i, "value": float(i), "series": "a"} for i in range(1200)] + [{"x": 0, "value": None, "series": "b"}]
    points = average_points(rows)
    assert len(points) == 601
    assert points[0] == {"x": 1, "value": 0.5, "series": "a"} and points[-1]["value"] is None


def test_a_miss_lists_its_positive_with_its_rank() -> None:
    scores = np.linspace(1, 0, 20)
    is_relevant = np.arange(20) == 14
    query = describe_query("q", scores, is_relevant, np.argsort(-scores))
    assert query["rank"] == 15
    assert [n["rank"] for n in query["neighbors"]] == [*range(1, 11), 15]
    assert query["neighbors"][-1] == {"document": 14, "rank": 15, "score": round(float(scores[14]), 4), "relevant": True}


def test_similarities_are_those_of_positives_nearest_and_random_others() -> None:
    scores = np.array([[0.9, 0.5, 0.1, 0.2, 0.3, 0.4, 0.0, -0.1]])
    is_relevant = np.arange(8)[None] == 1
    kinds = compare_pairs(scores, is_relevant, np.argsort(-scores, axis=1), np.random.default_rng(0))
    assert kinds["positives"].tolist() == [0.5]
    assert kinds["hard negatives"].tolist() == [0.9, 0.4, 0.3, 0.2, 0.1]
    assert len(kinds["random negatives"]) == 5 and 0.5 not in kinds["random negatives"]


def test_the_map_is_the_projection_on_the_principal_axes() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)) * [9, 4, 0.1, 0.1, 0.1]
    points, variance = project_texts([Source("a", [str(i) for i in range(40)], vectors, "")])
    places = {point["text"]: (point["x"], point["y"]) for point in points}
    variances, axes = np.linalg.eigh(np.cov(vectors.T))
    for axis in range(2):
        expected = vectors @ axes[:, -1 - axis]
        found = np.array([places[str(i)][axis] for i in range(40)])
        assert abs(np.corrcoef(expected, found)[0, 1]) == pytest.approx(1)
    assert variance == pytest.approx(variances[-2:].sum() / variances.sum())


def test_the_heat_map_has_the_weights_of_the_model(run: Path) -> None:
    embedder = Embedder.load(run)
    texts = [f"a text about {topic}" for topic in TOPICS]
    cells, note = compute_latent_attention([Source("a", texts, np.zeros((len(texts), 1)), "")], embedder)
    weights = embedder.latent_weights(texts[:10], "")
    assert len(cells) == 10 * 16 and "all 16 pairs of head and latent" in note
    for cell in cells:
        text = texts.index(cell["text"])
        assert cell["weight"] == pytest.approx(weights[text, cell["head"] - 1, cell["latent"] - 1], abs=1e-5)
