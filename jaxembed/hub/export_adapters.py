"""Export the adapters of a run as PEFT folders."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from jaxembed.config import LoraConfig
from jaxembed.data.scratch import move_into_place, open_scratch_folder
from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.formats.peft import read_adapters, write_adapters
from jaxembed.hub.card import format_adapter_card
from jaxembed.hub.embedder import Embedder, build_embedder
from jaxembed.hub.parity import FLOAT32_TOLERANCE, PROBE_TEXTS, Parity, compare_vectors
from jaxembed.hub.resolve import find_run
from jaxembed.hub.restore import RestoredRun
from jaxembed.hub.spec_files import write_spec
from jaxembed.model.lora import concatenate_adapters
from jaxembed.model.transformer import ComputeOptions

log = logging.getLogger("jaxembed")


def export_adapters(run_dir: Path, out: Path, checkpoint: str) -> Parity:
    """Write the adapters of a run with their spec and tokenizer. Named adapters get a folder each below `out`.

    Readers of such a folder add the adapters to the files of the base. The vectors are therefore compared with those of the
    adapters on the base in float32. A run with a quantized base has slightly different vectors. The returned
    `cosine` then compares with these.

    Args:
        run_dir: The run directory.
        out: The new folder. Its parent must exist.
        checkpoint: best, last, or a step.

    Returns:
        The worst comparison of all adapters.

    Raises:
        UserError: The run has no adapters, it trained its pooling or projection too, or the vectors differ. Nothing is written
            then.
    """
    mesh = make_mesh()
    run_base = find_run(str(run_dir), run_dir, checkpoint)
    lora = run_base.lora
    if lora is None:
        raise UserError(f"{run_dir}: no adapters (the run was trained without model.lora). Export it without --adapters.")
    run = run_base.restore(ComputeOptions(), mesh)
    if other_parts := run.trained.keys() - {"decoder"}:
        raise UserError(
            f"{run_dir}: its {' and '.join(sorted(other_parts))} was trained too, which a PEFT folder cannot hold. "
            "Export it without --adapters."
        )
    is_rounded = lora.base_dtype != "float32"
    float32_run = run_base.restore(ComputeOptions(), mesh, base_dtype="float32") if is_rounded else run
    comparisons = []
    with open_scratch_folder(out) as scratch:
        root = scratch / "adapters"
        for name in lora.names or (None,):
            # Write the adapter, and compare its vectors as they are read back.
            adapter_run, folder = float32_run.select_adapter(name), root / (name or "")
            folder.mkdir(parents=True)
            _write_adapter(folder, adapter_run, lora)
            embedder, vectors = build_embedder(adapter_run, mesh), Embedder.load(folder).encode(PROBE_TEXTS)
            parity = compare_vectors(embedder.encode(PROBE_TEXTS), vectors, FLOAT32_TOLERANCE)
            if not parity.passes:
                raise UserError(f"{out}: not written, because {parity}.")
            # Compare with the vectors of the run itself.
            if is_rounded:
                _, params = run.select_adapter(name).merge_adapters()
                rounded_parity = compare_vectors(embedder.with_params(params).encode(PROBE_TEXTS), vectors, FLOAT32_TOLERANCE)
                parity = dataclasses.replace(parity, cosine=rounded_parity.cosine)
            comparisons.append(parity)
        move_into_place(root, out)
    worst = Parity(max(p.error for p in comparisons), FLOAT32_TOLERANCE, min(p.cosine for p in comparisons))
    if is_rounded:
        log.warning(
            "the adapters were trained on a base in %s, but readers add them to the unrounded base: cosine to the run's own "
            "vectors at least %.6f",
            lora.base_dtype, worst.cosine,
        )  # fmt: skip
    return worst


def _write_adapter(folder: Path, run: RestoredRun, lora: LoraConfig) -> None:
    """Write an adapter. Those that the run has merged into its base are joined with it, so that the base itself fits."""
    spec, base_name, transformer = run.model.spec, run.base.trained_from, run.model.transformer
    merged_adapters = [read_adapters(merged_folder, transformer)[1] for merged_folder in run.base.merged_adapters]
    lora, adapters = concatenate_adapters(lora, [*merged_adapters, run.trained])
    write_adapters(folder, adapters, lora, base_name, transformer.family)
    run.build_tokenizer().hf_tokenizer.save_pretrained(folder)
    write_spec(folder, spec)
    (folder / "README.md").write_text(format_adapter_card(spec, base_name), encoding="utf-8")
