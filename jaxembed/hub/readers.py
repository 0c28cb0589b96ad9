"""The programs that load exported folders, and how they treat them, for the log of export and the model card.

`reader_rules.py` has the rules for models of different properties. The versions are those that were compared with
`probe.json`. TEI's source was read, not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxembed.hub.reader_rules import (
    READER_RULES,
    STORES,
    Rule,
    ServedModel,
    Status,
    has_own_weights,
    has_unserved_pooling,
    is_bidirectional_decoder,
    runs_on_tei_cpus,
)

FOLDER_NAME = "PATH_OF_THIS_FOLDER"


@dataclasses.dataclass(frozen=True)
class Reader:
    """A program that loads exported folders.

    Attributes:
        name: Name and, if versions differ, version.
        tested: Versions that were compared.
        usage: Command or code that loads the folder.
    """

    name: str
    tested: str
    usage: Callable[[ServedModel], str]


def _format_transformers(model: ServedModel) -> str:
    return f'`AutoModel.from_pretrained("{FOLDER_NAME}")`, then {model.spec.pooling} pooling'


def _format_sentence_transformers(model: ServedModel) -> str:
    trust = ", trust_remote_code=True" if has_own_weights(model) else ""
    return f'`SentenceTransformer("{FOLDER_NAME}"{trust})`'


def _format_tei(model: ServedModel) -> str:
    dtype = "float32" if runs_on_tei_cpus(model) else "float16"
    pooling = " --pooling mean" if has_unserved_pooling(model) else ""
    return f"`text-embeddings-router --model-id {FOLDER_NAME} --dtype {dtype}{pooling}`"


def _format_llama_cpp(model: ServedModel) -> str:
    # The converter stores the pooling only for some families.
    pooling = {"first": "cls"}.get(model.spec.pooling, model.spec.pooling)
    options = f"--embedding --pooling {pooling}" + (" --parallel 1" if is_bidirectional_decoder(model) else "")
    return f"`convert_hf_to_gguf.py {FOLDER_NAME} --outtype f32 --outfile model.gguf`, `llama-server -m model.gguf {options}`"


def _format_onnx(library: str) -> Callable[[ServedModel], str]:
    return lambda model: f"`onnx/model.onnx` in {library}, inputs `input_ids` and `attention_mask`"


def _format_langchain(model: ServedModel) -> str:
    names = [side for side in ("query", "document") if model.spec.prompts.get(side)]
    keys = {"query": "query_encode_kwargs", "document": "encode_kwargs"}
    prompts = "".join(f', {keys[name]}={{"prompt_name": "{name}"}}' for name in names)
    trust = ', model_kwargs={"trust_remote_code": True}' if has_own_weights(model) else ""
    return f'`HuggingFaceEmbeddings(model_name="{FOLDER_NAME}"{trust}{prompts})`'


def _format_llama_index(model: ServedModel) -> str:
    keys = {"query": "query_instruction", "document": "text_instruction"}
    prompts = "".join(f", {key}={model.spec.prompts[side]!r}" for side, key in keys.items() if model.spec.prompts.get(side))
    trust = ", trust_remote_code=True" if has_own_weights(model) else ""
    return f'`HuggingFaceEmbedding("{FOLDER_NAME}"{trust}{prompts})`'


READERS = (
    Reader("transformers", "5.23", _format_transformers),
    Reader("sentence-transformers 6", "6.2", _format_sentence_transformers),
    Reader("sentence-transformers 5", "5.1, 5.7", _format_sentence_transformers),
    Reader("sentence-transformers 3, 4", "3.4, 4.1", _format_sentence_transformers),
    Reader("vLLM", "0.32", lambda model: f"`vllm serve {FOLDER_NAME} --runner pooling --dtype {model.dtype}`"),
    Reader("TEI", "source, July 2026", _format_tei),
    Reader("llama.cpp", "of llama-cpp-python 0.3.36", _format_llama_cpp),
    Reader("ONNX Runtime", "1.32", _format_onnx("onnxruntime")),
    Reader("OpenVINO", "2026.4", _format_onnx("openvino")),
    Reader("LangChain", "1.2", _format_langchain),
    Reader("LlamaIndex", "0.8", _format_llama_index),
    Reader(
        STORES,
        "1.5, 0.40",
        lambda model: (
            f'`SentenceTransformerEmbeddingFunction("{FOLDER_NAME}")`, '
            f'`get_registry().get("sentence-transformers").create(name="{FOLDER_NAME}")`'
        ),
    ),
    Reader("infinity", "0.0.78", lambda model: f"`infinity_emb v2 --model-id {FOLDER_NAME}`"),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How the vectors of a reader compare with the model's, and why.

    Attributes:
        reader: The reader.
        status: The worst status of the rules that apply.
        reasons: Reasons of these rules. If the reader refuses the folder, only the reasons of the refusal.
    """

    reader: Reader
    status: Status
    reasons: tuple[str, ...]


def judge_readers(model: ServedModel) -> list[Verdict]:
    """Return the verdict of every reader on a model, in the order of `READERS`."""
    applying = [rule for rule in READER_RULES if rule.applies(model)]
    verdicts = []
    for reader in READERS:
        rules = [rule for rule in applying if reader.name in rule.readers]
        status = max((rule.status for rule in rules), default=Status.EQUAL)
        relevant = [rule for rule in rules if status < Status.REFUSED or rule.status == Status.REFUSED]
        verdicts.append(Verdict(reader, status, tuple(_format_reason(rule, model) for rule in relevant)))
    return verdicts


def list_limits(model: ServedModel) -> list[str]:
    """Return one line for each announced rule: the readers that compute different vectors or none, and the reason.

    For a reader that refuses the model, one reason is enough.
    """
    refusing = {verdict.reader.name for verdict in judge_readers(model) if verdict.status == Status.REFUSED}
    lines, refused_names = [], set[str]()
    for rule in (rule for rule in READER_RULES if rule.is_announced and rule.applies(model)):
        candidates = refusing - refused_names if rule.status == Status.REFUSED else set(rule.readers) - refusing
        if names := [name for name in rule.readers if name in candidates]:
            status = "" if rule.status == Status.CONDITIONAL else f"{rule.status}: "
            lines.append(f"{', '.join(names)}: {status}{_format_reason(rule, model)}")
        if rule.status == Status.REFUSED:
            refused_names |= set(names)
    return lines


def format_reader_table(model: ServedModel) -> str:
    """Return the Markdown table of the model card: readers, tested versions, vectors, usage."""
    rows = []
    for verdict in judge_readers(model):
        status = f"**{verdict.status}**" if verdict.status >= Status.DIFFERENT else str(verdict.status)
        vectors = ": ".join(filter(None, [status, "; ".join(verdict.reasons)]))
        usage = "" if verdict.status == Status.REFUSED else verdict.reader.usage(model)
        rows.append(f"| {verdict.reader.name} | {verdict.reader.tested} | {vectors} | {usage} |")
    return "\n".join(["| reader | tested | vectors | how |", "|---|---|---|---|", *rows])


def _format_reason(rule: Rule, model: ServedModel) -> str:
    return rule.reason.format(pooling=model.spec.pooling, rope=model.rope_type)
