"""Tasks of MTEB by name, benchmark and language."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from jaxembed.errors import UserError
from jaxembed.evaluation.mteb_catalog import find_tasks, import_mteb
from jaxembed.evaluation.tasks import GroupMember


def test_a_task_of_several_benchmarks_is_scored_once_with_all_its_subsets() -> None:
    found = find_tasks([], ["MTEB(eng, v1)", "MTEB(fra, v1)"], [])
    by_name = {task.metadata.name: (task, groups) for task, groups in found}
    assert len(by_name) == len(found) > 56
    task, groups = by_name["STS22"]
    assert groups == (GroupMember("MTEB(eng, v1)", "STS", ("en",)), GroupMember("MTEB(fra, v1)", "STS", ("fr",)))
    assert task.hf_subsets == ["en", "fr"]
    again = {task.metadata.name: task for task, _ in find_tasks([], ["MTEB(eng, v1)"], [])}
    assert again["STS22"].hf_subsets == ["en"]  # mteb's own objects are not changed


def test_long_documents_and_domains_work_by_name() -> None:
    names = {task.metadata.name for task, _ in find_tasks([], ["LongEmbed"], [])}
    assert {"LEMBPasskeyRetrieval", "LEMBNarrativeQARetrieval"} <= names
    assert [task.metadata.name for task, _ in find_tasks(["LEMBNeedleRetrieval"], [], [])] == ["LEMBNeedleRetrieval"]


def test_languages_keep_their_subsets_and_have_tables() -> None:
    [(task, groups)] = find_tasks(["STS22"], [], ["fra", "cmn-Hans"])
    assert set(task.hf_subsets) == {"fr", "de-fr", "fr-pl", "zh", "zh-en"}
    assert {group.group: set(group.subsets) for group in groups} == {
        "fra": {"fr", "de-fr", "fr-pl"}, "cmn-Hans": {"zh", "zh-en"}
    }  # fmt: skip
    assert find_tasks(["STS22"], [], ["fra"])[0][1] == ()
    both = find_tasks([], ["MTEB(eng, v1)"], ["eng"])
    assert len(both) == 56


FRENCH = "--languages: no such language 'french' (expected codes of ISO 639-3, such as eng or eng-Latn). Did you mean 'fra'?"


@pytest.mark.parametrize(
    ("names", "benchmarks", "languages", "line"),
    [
        (["Zzzz"], [], [], "mteb: no such task 'Zzzz'."),
        (["STSBenchmrk"], [], [], "mteb: no such task 'STSBenchmrk'. Did you mean 'STSBenchmark'"),
        ([], ["MTEB(eng, v3)"], [], "mteb: no such benchmark 'MTEB(eng, v3)'. Did you mean 'MTEB(eng, v"),
        (["STS22"], [], ["french"], FRENCH),
        (["STS22"], [], ["fra-Latin"], "--languages: no such language 'fra-Latin'"),
        (["CIFAR10Clustering"], [], [], "mteb: CIFAR10Clustering has image (expected texts). Choose other tasks."),
        (["STS22"], [], ["jpn"], "--languages: no task has jpn. Choose other languages or tasks."),
    ],
)  # fmt: skip
def test_unknown_names_are_one_line(names: list[str], benchmarks: list[str], languages: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        find_tasks(names, benchmarks, languages)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), RuntimeError("Could not determine home directory")]
)
def test_a_home_that_mteb_cannot_use_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """mteb creates a folder in it on import."""
    real_import = builtins.__import__

    def fail(name: str, *args: Any) -> Any:
        if name == "mteb":
            raise error
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UserError, match=r"mteb: cannot be imported \(.*\)\. Set HOME or MTEB_CACHE to a folder"):
        import_mteb()
