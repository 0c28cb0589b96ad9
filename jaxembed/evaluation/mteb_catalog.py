"""Find tasks of MTEB: by name, by benchmark, by language."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from jaxembed.errors import UserError, suggest, summarize
from jaxembed.evaluation.tasks import GroupMember


def import_mteb() -> Any:
    """Import mteb, or raise a `UserError` that says how to install it."""
    try:
        import mteb
    except ModuleNotFoundError:
        raise UserError("mteb is not installed. Run pip install '.[eval]'.") from None
    except (OSError, RuntimeError) as error:  # mteb creates its cache on import; RuntimeError: no home directory
        reason = summarize(error)
        raise UserError(
            f"mteb: cannot be imported ({reason}). Set HOME or MTEB_CACHE to a folder that can be written."
        ) from None
    return mteb


def find_tasks(
    names: Sequence[str], benchmarks: Sequence[str], languages: Sequence[str]
) -> list[tuple[Any, tuple[GroupMember, ...]]]:
    """Return tasks of MTEB, each with the tables of results that it belongs to.

    Args:
        names: Names of tasks.
        benchmarks: Names of benchmarks. A task of several benchmarks is returned once, with the subsets of all of them.
        languages: Languages to keep, as ISO 639-3 codes such as eng or eng-Latn. Empty: all.

    Returns:
        mteb's task objects with their tables: one per benchmark. Without benchmarks, one per language if there are several.

    Raises:
        UserError: mteb does not have a task, a benchmark or a language, no task has the languages, or a task is not text only.
    """
    mteb = import_mteb()
    _check_languages(languages)
    tasks: dict[str, tuple[Any, list[GroupMember]]] = {}
    for group, task in [*_iter_named_tasks(mteb, names), *_iter_benchmark_tasks(mteb, benchmarks)]:
        if other_modalities := [modality for modality in task.metadata.modalities if modality != "text"]:
            raise UserError(
                f"mteb: {task.metadata.name} has {' and '.join(other_modalities)} (expected texts). Choose other tasks."
            )
        if not _keep_languages(task, languages):
            continue
        known_task, groups = tasks.setdefault(task.metadata.name, (task, []))
        known_task.hf_subsets = list(dict.fromkeys([*known_task.hf_subsets, *task.hf_subsets]))
        if group:
            groups.append(GroupMember(group, str(task.metadata.type), tuple(task.hf_subsets)))
    if not tasks:
        raise UserError(f"--languages: no task has {' or '.join(languages)}. Choose other languages or tasks.")
    if not benchmarks and len(languages) > 1:
        return [(task, _group_by_language(task, languages)) for task, _ in tasks.values()]
    return [(task, tuple(groups)) for task, groups in tasks.values()]


def _iter_named_tasks(mteb: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield an empty string, as they belong to no benchmark, and the task of each name."""
    for name in names:
        try:
            yield "", mteb.get_task(name)
        except KeyError:
            from mteb.get_tasks import TASK_LIST

            task_names = [task.metadata.name for task in TASK_LIST]
            raise UserError(f"mteb: no such task {name!r}.{suggest(name, task_names)}") from None


def _iter_benchmark_tasks(mteb: Any, benchmarks: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the name of the benchmark and the task, for each task of each benchmark."""
    for name in benchmarks:
        try:
            benchmark = mteb.get_benchmark(name)
        except KeyError:
            known_names = [benchmark.name for benchmark in mteb.get_benchmarks()]
            raise UserError(f"mteb: no such benchmark {name!r}.{suggest(name, known_names)}") from None
        for task in benchmark.tasks:
            yield str(benchmark.name), copy.copy(task)  # mteb gives every caller the same objects


def _check_languages(languages: Sequence[str]) -> None:
    """Raise `UserError` for a language that mteb does not know. The error suggests a code, also for names such as German."""
    if not languages:
        return
    from mteb.languages import ISO_TO_LANGUAGE, check_language_code

    codes_by_name = {name: code for code, name in ISO_TO_LANGUAGE.items()}
    for language in languages:
        try:
            check_language_code(language) if "-" in language else ISO_TO_LANGUAGE[language]
        except (KeyError, ValueError):
            code = next((code for name, code in codes_by_name.items() if name.lower() == language.lower()), None)
            hint = f" Did you mean {code!r}?" if code else suggest(language, ISO_TO_LANGUAGE)
            raise UserError(
                f"--languages: no such language {language!r} (expected codes of ISO 639-3, such as eng or eng-Latn).{hint}"
            ) from None


def _keep_languages(task: Any, languages: Sequence[str]) -> bool:
    """Keep the subsets of a task that have one of the languages. Return whether there are any."""
    if not languages:
        return True
    try:
        task.filter_languages(list(languages), hf_subsets=list(task.hf_subsets))
    except ValueError:  # mteb raises it if no subset is left
        return False
    return bool(task.hf_subsets)


def _group_by_language(task: Any, languages: Sequence[str]) -> tuple[GroupMember, ...]:
    """Return a table for each language, with the subsets of a task that have it."""
    languages_by_subset = task.metadata.hf_subsets_to_langscripts
    members = (
        GroupMember(
            language,
            str(task.metadata.type),
            tuple(s for s in task.hf_subsets if any(code.startswith(language) for code in languages_by_subset.get(s, ()))),
        )
        for language in languages
    )
    return tuple(member for member in members if member.subsets)
