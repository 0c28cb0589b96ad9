"""Compare the vectors of a server with those in the probe.json of the folder that it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxembed.devices.mesh import make_mesh
from jaxembed.errors import UserError
from jaxembed.hub.base import BaseWithWeights
from jaxembed.hub.embedder import load_embedder
from jaxembed.hub.parity import MIN_COSINE, PROBE_FILE, Probe, read_probe_file
from jaxembed.hub.resolve import find_base_with_weights
from jaxembed.model.transformer import ComputeOptions
from jaxembed.verification.diagnosis import (
    HALF_DTYPES,
    Diagnosis,
    VariantEncoder,
    diagnose,
    measure_half_precision,
    to_unit_vectors,
)
from jaxembed.verification.served_vectors import EmbeddingServer, InputRefusedError

MAX_LENGTH_ERROR = 0.01  # of a vector of unit length; bfloat16 rounds to 0.004
MIN_PROBE_FILE_COSINE = {"float32": 0.999, "bfloat16": 0.9}  # between probe.json and the folder's weights, by their dtype


@dataclasses.dataclass(frozen=True)
class ServedVectors:
    """The vectors that a server returned for N texts.

    Attributes:
        vectors: Vectors from requests with one text each, float64 [N, W]. NaN where the server refused a text.
        group_vectors: Vectors from requests with several texts each, float64 [N, W].
        refusals: Messages of refused texts, by index.
        group_refusal: Message with which the server refused several texts in one request; empty if it did not.
    """

    vectors: np.ndarray
    group_vectors: np.ndarray
    refusals: dict[int, str]
    group_refusal: str = ""

    @property
    def indices(self) -> list[int]:
        """Indices of the texts that have a vector."""
        return [i for i in range(len(self.vectors)) if i not in self.refusals]


@dataclasses.dataclass(frozen=True)
class Verification:
    """Result of comparing the vectors of a server with those of a folder.

    Attributes:
        cosines: Cosine of the two vectors of each probe; None if the server returned no vector.
        min_cosine: Vectors with at least this cosine count as equal.
        findings: One line for each difference that is found without the model.
        diagnosis: Variants of the model that explain the server's vectors. None: not needed or not requested.
    """

    cosines: list[float | None]
    min_cosine: float
    findings: list[str]
    diagnosis: Diagnosis | None = None

    @property
    def are_vectors_equal(self) -> bool:
        """Whether every vector that the server returned equals the folder's."""
        is_explained = self.diagnosis is not None and any(not match.changes for match in self.diagnosis.matches)
        returned = [cosine for cosine in self.cosines if cosine is not None]
        return is_explained or (bool(returned) and min(returned) >= self.min_cosine)

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return self.are_vectors_equal and not self.findings


@dataclasses.dataclass(frozen=True)
class VerifiedFolder:
    """An exported folder with its probes.

    Attributes:
        path: The folder.
        base: The model in it; its weights are not loaded.
        probes: The probes.
    """

    path: Path
    base: BaseWithWeights
    probes: list[Probe]

    @property
    def inputs(self) -> list[str]:
        """The string that a client sends for each probe: prompt, text, and the suffix that follows texts with a prompt."""
        return [probe.prompt + probe.text + self.base.spec.get_suffix(probe.prompt) for probe in self.probes]

    @property
    def dtype(self) -> str:
        """Dtype of the weights."""
        return str(self.base.hf_config.get("dtype") or self.base.hf_config.get("torch_dtype") or "float32")


def open_folder(path: Path) -> VerifiedFolder:
    """Read an exported folder, except its weights.

    Raises:
        UserError: The path is not a folder with a model and a probe.json.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder. Name the folder that the server serves.")
    return VerifiedFolder(path, find_base_with_weights(str(path)), read_probe_file(path))


def request_vectors(
    server: EmbeddingServer, inputs: Sequence[str], advance: Callable[[], object] = lambda: None
) -> ServedVectors:
    """Request the vector of each input separately, then of several inputs in one request.

    Args:
        server: The server.
        inputs: N texts with their prompts.
        advance: Called after each input, for a progress bar.

    Raises:
        UserError: The server fails, refuses every input, or returns vectors of different widths.
    """
    # Request each input separately.
    vectors: dict[int, np.ndarray] = {}
    refusals: dict[int, str] = {}
    for i, text in enumerate(inputs):
        try:
            vectors[i] = server.encode([text])[0]
        except InputRefusedError as error:
            refusals[i] = str(error)
        advance()
    if not vectors:
        raise UserError(f"{server.client.root}{server.path}: the server refuses every text ({refusals[0]}).")
    if len(widths := sorted({len(vector) for vector in vectors.values()})) > 1:
        raise UserError(f"{server.client.root}: vectors of different widths ({', '.join(map(str, widths))}). Check the server.")
    single_vectors, group_vectors = (np.full((len(inputs), widths[0]), np.nan) for _ in range(2))
    single_vectors[list(vectors)] = list(vectors.values())
    # Request the accepted inputs again, several in a request.
    group_refusal = ""
    try:
        accepted_vectors = server.encode_in_groups([inputs[i] for i in vectors])
        if accepted_vectors.shape[1] == widths[0]:
            group_vectors[list(vectors)] = accepted_vectors
    except InputRefusedError as error:
        group_refusal = str(error)
    return ServedVectors(single_vectors, group_vectors, refusals, group_refusal)


def compare_with_probes(
    folder: VerifiedFolder, server: EmbeddingServer, served: ServedVectors, tolerance: float | None = None
) -> Verification:
    """Compare the vectors of a server with probe.json. The weights of the folder are not needed.

    Args:
        folder: The folder.
        server: The server.
        served: The vectors of the server for the inputs of the folder.
        tolerance: Vectors with at least this cosine count as equal. Default: `MIN_COSINE`.
    """
    width = served.vectors.shape[1]
    min_cosine = MIN_COSINE if tolerance is None else tolerance
    expected = np.stack([probe.vector for probe in folder.probes]).astype(np.float64)
    cosines: list[float | None] = [None] * len(folder.probes)
    if width <= expected.shape[1]:
        values = np.sum(to_unit_vectors(expected[:, :width]) * to_unit_vectors(served.vectors), axis=1)
        cosines = [None if np.isnan(value) else float(value) for value in values]
    full_width = server.dim or expected.shape[1]
    findings = [*_find_refusals(served), *_find_length_errors(folder, served), *_find_group_errors(served, min_cosine)]
    if width != full_width:
        findings.append(f"width: {width} dimensions instead of {full_width}.")
    return Verification(cosines, min_cosine, findings)


def _find_refusals(served: ServedVectors) -> list[str]:
    """Return a finding if the server refuses texts."""
    if not served.refusals:
        return []
    count, first = len(served.refusals), next(iter(served.refusals.values()))
    problem = f"long texts: the server refuses {count} of {len(served.vectors)} texts, which the folder truncates ({first})"
    return [f"{problem}. Truncate in the client, or let the server do it."]


def _find_length_errors(folder: VerifiedFolder, served: ServedVectors) -> list[str]:
    """Return a finding if vectors should have unit length, but have not."""
    lengths = np.linalg.norm(served.vectors[served.indices], axis=1)
    if not folder.base.spec.normalize or np.abs(lengths - 1).max() <= MAX_LENGTH_ERROR:
        return []
    length_range = f"{lengths.min():.4g} to {lengths.max():.4g}"
    return [f"normalization: vectors of length {length_range} instead of 1. Normalize in the server or in the client."]


def _find_group_errors(served: ServedVectors, min_cosine: float) -> list[str]:
    """Return a finding if vectors depend on the other texts of the request, or such requests are refused."""
    if served.group_refusal:
        return [f"several texts in one request: refused, although each one alone is accepted ({served.group_refusal})."]
    single_vectors, group_vectors = (
        to_unit_vectors(vectors[served.indices]) for vectors in (served.vectors, served.group_vectors)
    )
    least = float(np.sum(single_vectors * group_vectors, axis=1).min())
    if least >= min_cosine:
        return []
    problem = f"several texts in one request: the vectors differ from those of single requests (least cosine {least:.6f})"
    return [f"{problem}. Send one by one. llama.cpp needs --parallel 1 or --kv-unified for bidirectional models."]


def diagnose_server(
    folder: VerifiedFolder,
    server: EmbeddingServer,
    served: ServedVectors,
    result: Verification,
    dtype: str | None,
    is_tolerance_set: bool,
) -> Verification:
    """Load the folder's model, and find out why vectors differ.

    It has six parameters, because the folder, the server and the comparison are separate.

    Args:
        folder: The folder.
        server: The server.
        served: Its vectors.
        result: Their comparison with probe.json.
        dtype: Dtype of the server's computation. Default: the one that it reports, otherwise that of the folder's weights.
        is_tolerance_set: Whether the user set `result.min_cosine`. Otherwise it follows from the dtype.

    Raises:
        UserError: The vectors have another width, which no variant explains, or probe.json does not fit the weights.
    """
    embedder = load_embedder(folder.base, folder.base.spec, ComputeOptions(unroll=False), make_mesh(1))
    with jax.default_matmul_precision("highest"):
        encoder = VariantEncoder(embedder, folder.probes, served.vectors.shape[1], server.dim)
        if not encoder.pools:
            raise _explain_width(folder, server, served)
        short_indices = encoder.select_short(served.indices)
        if any(cosine is not None for cosine in result.cosines):
            _check_probe_file(folder, encoder, short_indices)
        # A server that computes in half precision may differ more, and then nothing is left to explain.
        dtype = dtype or server.info.dtype or folder.dtype
        if dtype in HALF_DTYPES and not is_tolerance_set:
            bound = min(MIN_COSINE, measure_half_precision(encoder, dtype, short_indices))
            result = compare_with_probes(folder, server, served, bound)
            if result.are_vectors_equal:
                return result
        vectors = to_unit_vectors(served.vectors)
        diagnosis = diagnose(encoder, vectors, served.indices, result.min_cosine, server.info.max_lengths)
    if not diagnosis.matches and served.vectors.shape[1] != (server.dim or len(folder.probes[0].vector)):
        raise _explain_width(folder, server, served)
    return dataclasses.replace(result, diagnosis=diagnosis)


def _explain_width(folder: VerifiedFolder, server: EmbeddingServer, served: ServedVectors) -> UserError:
    return UserError(
        f"{server.client.root}: vectors of {served.vectors.shape[1]} dimensions (those of {folder.path} have "
        f"{len(folder.probes[0].vector)}), so the server has another model, {server.model!r}. Serve the folder, or name "
        "its model with --model."
    )


def _check_probe_file(folder: VerifiedFolder, encoder: VariantEncoder, indices: Sequence[int]) -> None:
    """Raise `UserError` if the vectors in probe.json are not those of the weights, on some texts."""
    expected = to_unit_vectors(np.stack([folder.probes[i].vector[: encoder.width] for i in indices]))
    least = float(np.sum(expected * encoder.encode_unchanged(indices), axis=1).min())
    if least < MIN_PROBE_FILE_COSINE.get(folder.dtype, MIN_PROBE_FILE_COSINE["bfloat16"]):
        raise UserError(
            f"{folder.path / PROBE_FILE}: does not belong to the weights of its folder (least cosine {least:.4f}). "
            "Export the model again."
        )
