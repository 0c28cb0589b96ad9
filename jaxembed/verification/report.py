"""What `verify` prints: a line for each text, the differences with advice, and the result as one object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxembed.verification.comparison import Verification, VerifiedFolder
from jaxembed.verification.diagnosis import Diagnosis, VariantMatch
from jaxembed.verification.served_vectors import EmbeddingServer

MAX_PROBE_TEXT_CHARS, MAX_PROBE_PROMPT_CHARS = 50, 24
# What to do about a difference, by its setting.
CHANGE_ADVICE = {
    "attention": "The server ignores the mask in config.json. Use one that reads it (decoders: transformers 5.2 or newer).",
    "sliding window": "Use a server that reads the windows of config.json.",
    "RoPE scaling": "Use a server that reads the rotary positions of config.json.",
    "RoPE base": "Use a server that reads the rotary positions of config.json.",
    "GELU": "TEI approximates it, except on its CPU image with an ONNX graph: export with --onnx.",
    "pooling": "Choose the pooling in the server (vLLM: --pooler-config; TEI and llama.cpp: --pooling), or another server.",
    "instruction": "vLLM, TEI and llama.cpp pool every token. Train with model.pooling.include_instruction=true for them.",
    "projection": "The server skips the Dense module of the folder. Use one that reads modules.json.",
    "width": "Request the width with --dim, or request none.",
    "BOS": "The server does not use the post-processor of tokenizer.json. Change its setting for special tokens.",
    "EOS": "The server does not use the post-processor of tokenizer.json. Change its setting for special tokens.",
    "prompt": "Servers add no prompt: the client sends prompt and text as one string. Check the defaults of both.",
    "line breaks": "Something between client and server changes the text.",
    "letters": "Something between client and server changes the text.",
    "truncation": "Set the server's maximum length to that of the folder, or truncate in the client.",
    "dtype": "Start the server in float32, or accept its precision by --dtype.",
}


def iter_report_lines(folder: VerifiedFolder, server: EmbeddingServer, result: Verification) -> Iterator[str]:
    """Yield the lines for human readers: the server, each text with its cosine, and the verdict."""
    model = f", model {server.model}" if server.model else ""
    yield f"{server.client.root}: {server.info}{model}, API {server.api_name}{server.path}"
    yield f"  {'cosine':>9}  {'prompt':{MAX_PROBE_PROMPT_CHARS}}  text"
    for probe, cosine in zip(folder.probes, result.cosines, strict=True):
        value = "-" if cosine is None else f"{cosine:.6f}"
        prompt = _shorten(probe.prompt, MAX_PROBE_PROMPT_CHARS) if probe.prompt else "-"
        yield f"  {value:>9}  {prompt:{MAX_PROBE_PROMPT_CHARS}}  {_shorten(probe.text, MAX_PROBE_TEXT_CHARS)}"
    known_cosines = [cosine for cosine in result.cosines if cosine is not None]
    least = f"least cosine {min(known_cosines):.6f}, " if known_cosines else ""
    yield f"{'equal' if result.is_equal else 'different'}: {least}expected at least {result.min_cosine:.6g}"
    yield from (f"- {finding}" for finding in result.findings)
    if result.diagnosis is not None and not result.are_vectors_equal:
        yield from _iter_diagnosis_lines(result.diagnosis)


def _iter_diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.matches:
        closest = f"{_join_changes(diagnosis.closest)}, cosine {diagnosis.closest.cosine:.6f}"
        yield f"- no variant of the folder's model gives these vectors (closest: {closest})."
        yield "  The server has other weights, quantized ones, or more than one difference that is not tried."
        return
    first, *others = diagnosis.matches
    for change in first.changes:
        yield f"- {change}. {CHANGE_ADVICE[change.setting]}"
    subject = "this difference" if len(first.changes) == 1 else "these differences"
    yield f"  With {subject}, the folder gives the server's vectors (cosine {first.cosine:.6f})."
    if others:
        yield f"  The probe texts cannot distinguish this from: {'; or '.join(map(_join_changes, others))}."


def _join_changes(match: VariantMatch) -> str:
    return " and ".join(map(str, match.changes)) or "the folder as it is"


def _shorten(text: str, max_chars: int) -> str:
    """Return a text on one line of limited length."""
    line = " ".join(text.split())
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."


def summarize_verification(server: EmbeddingServer, result: Verification) -> dict[str, Any]:
    """Return the result as commands print it."""
    known_cosines = [cosine for cosine in result.cosines if cosine is not None]
    matches = None if result.diagnosis is None else [list(map(str, match.changes)) for match in result.diagnosis.matches]
    return {
        "equal": result.is_equal,
        "least_cosine": min(known_cosines, default=None),
        "tolerance": result.min_cosine,
        "url": server.client.root,
        "server": str(server.info),
        "api": server.api_name,
        "model": server.model,
        "findings": result.findings,
        "diagnosis": matches,
        "cosines": result.cosines,
    }
