"""The engine of `jaxembed curate`: runs stages of steps over streams of rows, resumes them, and writes the report.

OUT/.unfinished/inputs.json       hash of the sources; exists until the curation is finished
OUT/.unfinished/0/rows.jsonl      rows after the steps of a stage: [source, number, row] per line
OUT/.unfinished/0/dropped.npy     items that the last step of the stage drops; or changes.jsonl: its changes of each row
OUT/.unfinished/0/stage.json      hash and statistics of the stage; written last, so it marks a finished stage
OUT/SOURCE.jsonl, report.json, report.html
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from jaxembed.config.curation import CurateConfig
from jaxembed.config.sections import dump_changed_keys
from jaxembed.curation.batches import MapBatches, batched, keep_rows, map_batches
from jaxembed.curation.curation_page import PAGE_FILE, REPORT_FILE, render_page
from jaxembed.curation.curation_sources import CuratedSource, iter_curated_rows, open_curated_sources
from jaxembed.curation.curation_stats import CurationStepStats, RowStats
from jaxembed.curation.stages import (
    CurationContext,
    CurationStage,
    check_requirements,
    check_sides,
    compute_stage_digests,
    make_all_rows_step,
    needs_all_rows,
    needs_model,
    prepare_step,
    read_decisions,
    split_into_stages,
    write_decisions,
)
from jaxembed.curation.steps.changes import ChangingStep
from jaxembed.curation.steps.curated_row import CuratedRow, PreparedStep, RowStep, RowStepError, encode_row, is_json
from jaxembed.curation.steps.items import AllRowsStep
from jaxembed.data.convert import WRITERS, select_fields
from jaxembed.devices.processes import progress_bar
from jaxembed.errors import UserError
from jaxembed.files import atomic_write, exists, lock_folder, read_json, write_json, write_text

UNFINISHED_FOLDER = ".unfinished"
INPUTS_FILE, ROWS_FILE, STAGE_FILE = "inputs.json", "rows.jsonl", "stage.json"
log = logging.getLogger("jaxembed")


def curate(
    config: CurateConfig, context: CurationContext, where: str, map_in_workers: MapBatches = map_batches
) -> dict[str, Any]:
    """Run all steps and write the training files and the report.

    Args:
        config: The whole config.
        context: The resources that steps share.
        where: File of the config, for errors.
        map_in_workers: Applies the steps that process rows independently to batches of rows. Default: in this process.

    Returns:
        The output folder, its files, and the rows in and out of each source.

    Raises:
        UserError: The input is bad, or a user's function fails. Finished stages are kept, and the same command continues.
    """
    out = Path(config.out)
    check_output(out)
    for step in config.steps:
        check_requirements(step)
    row_steps = {i: prepare_step(step, context) for i, step in enumerate(config.steps) if not needs_all_rows(step)}
    sources = open_curated_sources(config.sources, context.cache, where)
    check_sides(config, [source.format for source in sources])
    inputs = [[source.name, source.format, source.digest, source.num_rows, source.keys] for source in sources]
    inputs_digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    with lock_output(out, inputs_digest):
        Curation(config, out, sources, row_steps, context, map_in_workers).run(inputs_digest)
        report = write_report(config, out, sources)
        remove_unfinished(out)
    outputs = report["output"]["sources"]
    rows = {source.name: {"in": source.num_rows, "out": outputs[source.name]["rows"]} for source in sources}
    files = [str(out / name) for name in report["files"].values()]
    return {"out": str(out), "files": files, "report": str(out / PAGE_FILE), "rows": rows}


class Curation:
    """The stages of a curation, with the files that connect them."""

    def __init__(
        self,
        config: CurateConfig,
        out: Path,
        sources: Sequence[CuratedSource],
        row_steps: dict[int, PreparedStep],
        context: CurationContext,
        map_in_workers: MapBatches,
    ):
        """Prepare all stages.

        Args:
            config: The whole config.
            out: Output folder.
            sources: The open sources.
            row_steps: The steps that see one row at a time, by index.
            context: The resources that steps share.
            map_in_workers: Applies the steps that process rows independently to batches of rows.
        """
        self.map_in_workers = map_in_workers
        self.config, self.out, self.sources, self.row_steps, self.context = config, out, sources, row_steps, context
        self.stages = split_into_stages(config.steps)
        self.source_names = [source.name for source in sources]
        self.num_rows = sum(source.num_rows for source in sources)

    def run(self, inputs_digest: str) -> None:
        """Run the stages that are not finished."""
        digests = compute_stage_digests(self.config, self.stages, inputs_digest, self.row_steps)
        is_finished = [read_stage_digest(self.out, i) == digest for i, digest in enumerate(digests)]
        first = is_finished.index(False) if False in is_finished else len(digests)
        while 0 < first < len(digests) and not (get_stage_folder(self.out, first - 1) / ROWS_FILE).exists():
            first -= 1  # the rows that this stage reads were removed, so the previous stage must run again
        if first:
            log.info("%s: continues after %d of %d stages", self.out, first, len(digests))
        for i in range(first, len(digests)):
            try:
                self._run_stage(i, digests[i])
            except OSError as error:
                message = f"{self.out}: cannot be written ({error.strerror}). Make room, and the same command continues."
                raise UserError(message) from None
            if i:  # its rows are not needed any more
                (get_stage_folder(self.out, i - 1) / ROWS_FILE).unlink(missing_ok=True)

    def _run_stage(self, index: int, digest: str) -> None:
        """Read the rows of the previous stage, apply the steps of this stage, and store the result."""
        stage, folder = self.stages[index], get_stage_folder(self.out, index)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (scratch := folder / "keys").mkdir()
        functions = self._list_functions(index)
        step_stats = {i: CurationStepStats(self.source_names, self.config.seed) for i in functions}
        input_stats = RowStats(self.source_names, self.config.seed)
        with closing(self._iter_rows(index, stage, input_stats)) as rows:  # an error ends the progress bar first
            kept_rows = self._apply_steps(rows, functions, step_stats)
            if stage.all_rows_step is None:
                result = self._write_output(kept_rows)
            else:
                result = {}
                self._decide(stage.all_rows_step, kept_rows, folder, scratch)
        self._check_rows_left(step_stats, stage)
        shutil.rmtree(scratch)
        result |= {"digest": digest, "steps": {str(i): stats.to_json() for i, stats in step_stats.items()}}
        if index == 0:
            result["input"] = input_stats.to_json()
        write_json(folder / STAGE_FILE, result)

    def _apply_steps(
        self, rows: Iterable[CuratedRow], functions: Mapping[int, RowStep], stats: Mapping[int, CurationStepStats]
    ) -> Iterator[CuratedRow]:
        """Yield the rows that steps keep, and count the outcomes. Consecutive independent steps form a group.

        Only the first group of independent steps is mapped in workers, because they occupy the processors of the cluster.
        """
        groups = itertools.groupby(functions, lambda i: i in self.row_steps and not needs_model(self.config.steps[i]))
        map_independent = self.map_in_workers
        for is_independent, group in groups:
            chosen = {i: functions[i] for i in group}
            rows = self._apply_group(rows, chosen, stats, map_independent if is_independent else map_batches)
            if is_independent:
                map_independent = map_batches
        yield from rows

    def _apply_group(
        self,
        rows: Iterable[CuratedRow],
        functions: Mapping[int, RowStep],
        stats: Mapping[int, CurationStepStats],
        map_group: MapBatches,
    ) -> Iterator[CuratedRow]:
        """Yield the rows that a group of steps keeps, and count the outcomes in `stats`."""
        for batch, result in map_group(tuple(functions.values()), batched(rows)):
            if isinstance(result, RowStepError):
                raise UserError(f"{self.sources[result.row.source].locate(result.row.number)}: {result.problem}")
            for i, outcomes in zip(functions, result, strict=True):
                for row, outcome in zip(batch, outcomes, strict=True):
                    stats[i].add(row, outcome)
                batch = keep_rows(batch, outcomes)
            yield from batch

    def _decide(self, step_index: int, rows: Iterable[CuratedRow], folder: Path, scratch: Path) -> None:
        """Store the rows of a stage and the decisions of its last step in `folder`. `scratch` is for its temporary files."""
        config = self.config.steps[step_index]
        with closing(make_all_rows_step(config, scratch, self.num_rows, self.config, self.context)) as step:
            write_rows(folder / ROWS_FILE, rows, step)
            write_decisions(folder, step)

    def _list_functions(self, index: int) -> dict[int, RowStep]:
        """Return the functions of a stage by the index of their step. The first applies the decisions of the previous stage."""
        functions: dict[int, RowStep] = {}
        if index and (previous := self.stages[index - 1].all_rows_step) is not None:
            functions[previous] = read_decisions(get_stage_folder(self.out, index - 1), self.config.steps[previous])
        return functions | {i: self.row_steps[i].function for i in self.stages[index].row_steps}

    def _iter_rows(self, index: int, stage: CurationStage, stats: RowStats) -> Generator[CuratedRow]:
        """Yield the rows that a stage reads, with a progress bar."""
        previous_steps = () if not index else (self.stages[index - 1].all_rows_step,)
        step_names = [
            self.config.steps[i].name for i in (*previous_steps, *stage.row_steps, stage.all_rows_step) if i is not None
        ]
        description = f"stage {index + 1} of {len(self.stages)} ({', '.join(step_names) or 'output'})"
        if index:
            rows = read_rows(get_stage_folder(self.out, index - 1) / ROWS_FILE, self.sources)
            yield from progress_bar(rows, desc=description, unit="row")
            return
        for row in progress_bar(iter_curated_rows(self.sources), desc=description, unit="row", total=self.num_rows):
            stats.add(row)
            yield row

    def _write_output(self, rows: Iterable[CuratedRow]) -> dict[str, Any]:
        """Write one file for each source that has rows left. Return the file names and the statistics of the rows."""
        files, stats = {}, RowStats(self.source_names, self.config.seed)
        for name, extension in itertools.product(self.source_names, WRITERS):
            (self.out / f"{name}{extension}").unlink(missing_ok=True)  # of an earlier attempt with other steps
        for index, source_rows in itertools.groupby(rows, key=lambda row: row.source):
            path = self.out / f"{self.source_names[index]}.{self.config.format}"
            with atomic_write(path) as partial:
                WRITERS[path.suffix](partial, self._select_output(source_rows, stats))
            files[self.source_names[index]] = path.name
        return {"files": files, "output": stats.to_json()}

    def _select_output(self, rows: Iterable[CuratedRow], stats: RowStats) -> Iterator[dict[str, Any]]:
        """Yield the fields of each row that are written, and count the rows in `stats`."""
        for row in rows:
            stats.add(row)
            metadata = {field: row.fields[field] for field in self.config.output_metadata if field in row.fields}
            fields = select_fields(row.fields) | metadata
            if not is_json(fields):  # JSON has no dates, no NaN and no infinity
                fields = json.loads(encode_row(fields), parse_constant=lambda name: None)
            yield fields

    def _check_rows_left(self, step_stats: dict[int, CurationStepStats], stage: CurationStage) -> None:
        """Raise `UserError` if no row reached a step of the stage, or the output."""
        order = [*step_stats, *([] if stage.all_rows_step is None else [stage.all_rows_step])]
        for i, next_step in zip(order, [*order[1:], None], strict=True):
            if i not in step_stats or step_stats[i].has_rows_left:
                continue
            reader = "the output" if next_step is None else f"steps.{next_step} ({self.config.steps[next_step].name})"
            raise UserError(
                f"{reader}: no row is left, because steps.{i} ({self.config.steps[i].name}) dropped the last ones "
                f"({step_stats[i].describe_drops()}). Change that step."
            )


def write_rows(path: Path, rows: Iterable[CuratedRow], step: AllRowsStep | ChangingStep) -> None:
    """Write the rows of a stage, and pass them to the step that ends it."""
    with path.open("w", encoding="utf-8") as file:
        for batch in batched(rows):
            step.collect(batch)
            file.writelines(f"[{row.source},{row.number},{encode_row(row.fields)}]\n" for row in batch)


def read_rows(path: Path, sources: Sequence[CuratedSource]) -> Iterator[CuratedRow]:
    """Yield the rows of a stage."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            source, number, row = json.loads(line)
            yield CuratedRow(source, number, sources[source].format, row)


def get_stage_folder(out: Path, index: int) -> Path:
    """Return the folder of a stage."""
    return out / UNFINISHED_FOLDER / str(index)


def read_stage_digest(out: Path, index: int) -> str | None:
    """Return the hash of a finished stage, or None if it is not finished."""
    path = get_stage_folder(out, index) / STAGE_FILE
    return read_json(path).get("digest") if path.exists() else None


def check_output(out: Path) -> None:
    """Raise `UserError` if an output folder has content that is not an unfinished curation."""
    if not exists(out) or (out / UNFINISHED_FOLDER / INPUTS_FILE).exists():
        return
    if not out.is_dir() or any(path.name != UNFINISHED_FOLDER for path in out.iterdir()):
        raise UserError(f"{out}: already exists. Remove it, or name another folder with out.")


@contextmanager
def lock_output(out: Path, inputs_digest: str) -> Iterator[None]:
    """Create the output folder, or reopen an unfinished one of the same sources, and lock it against other processes.

    Raises:
        UserError: The folder belongs to other sources, is locked by another process, or cannot be created.
    """
    folder = out / UNFINISHED_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror}). Name another folder with out.") from None
    with lock_folder(folder, out):
        path = folder / INPUTS_FILE
        if path.exists() and read_json(path).get("digest") != inputs_digest:
            raise UserError(
                f"{out}: holds an unfinished curation of other sources. Remove it, or name another folder with out."
            )
        write_json(path, {"digest": inputs_digest})
        yield


def write_report(config: CurateConfig, out: Path, sources: Sequence[CuratedSource]) -> dict[str, Any]:
    """Write report.json and report.html from the files of the stages. Return the report."""
    stages = [read_json(get_stage_folder(out, i) / STAGE_FILE) for i in range(len(split_into_stages(config.steps)))]
    steps = {int(i): stats for stage in stages for i, stats in stage["steps"].items()}
    report = {
        "config": {key: value for key, value in dump_changed_keys(config).items() if key not in ("out", "memory_mb")},
        "sources": {s.name: {"path": s.path, "format": s.format, "rows": s.num_rows, "digest": s.digest} for s in sources},
        "files": stages[-1]["files"],
        "steps": [{"name": step.name, **steps[i]} for i, step in enumerate(config.steps)],
        "input": stages[0]["input"],
        "output": stages[-1]["output"],
    }
    write_json(out / REPORT_FILE, report)
    write_text(out / PAGE_FILE, render_page(report))
    return report


def remove_unfinished(out: Path) -> None:
    """Remove the files of the stages. The file that marks an unfinished output is removed last."""
    folder = out / UNFINISHED_FOLDER
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (folder / INPUTS_FILE).unlink()
    folder.rmdir()
