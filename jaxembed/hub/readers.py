"""How other programs treat an exported folder: one table of rules for the log of export and the model card.

A rule names a property of a model, the readers that it affects, and what they do. A reader without an applying rule computes
the vectors of the model. The versions are those that were compared with `probe.json`. TEI's source was read, not run.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.formats.stock_files import SERVED_POOLINGS
from jaxembed.model.families import FAMILIES, TransformerConfig
from jaxembed.model.pooling import TRAINABLE_POOLINGS

FOLDER_NAME = "PATH_OF_THIS_FOLDER"


class Status(enum.IntEnum):
    """How the vectors of a reader compare with the model's, from best to worst."""

    EQUAL = 0
    CONDITIONAL = 1
    CLOSE = 2
    DIFFERENT = 3
    REFUSED = 4

    def __str__(self) -> str:
        """Return the status as the card shows it."""
        return "equal" if self is Status.CONDITIONAL else self.name.lower()


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """The properties of an exported folder that decide how readers treat it.

    Attributes:
        spec: How texts become vectors.
        transformer: The transformer.
        dtype: Dtype of the weights.
        has_onnx: Whether the folder has an ONNX graph of the whole model, onnx/model.onnx.
    """

    spec: EmbeddingSpec
    transformer: TransformerConfig
    dtype: str = "float32"
    has_onnx: bool = False

    @property
    def is_encoder(self) -> bool:
        """Whether the family is an encoder, whose attention is bidirectional."""
        return FAMILIES[self.transformer.family].is_encoder

    @property
    def rope_type(self) -> str:
        """The kind of rotary scaling; "default" for none."""
        return str(dict(self.transformer.rope_scaling).get("rope_type", "default"))

    @property
    def has_window(self) -> bool:
        """Whether a sliding window is shorter than the texts."""
        return any(window is not None and window < self.spec.max_length for window in self.transformer.windows)

    @property
    def leaves_out_instructions(self) -> bool:
        """Whether the pooling skips tokens of an instruction that it could reach."""
        return not self.spec.include_instruction and self.spec.pooling != "last"


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


@dataclasses.dataclass(frozen=True)
class Rule:
    """How some readers treat models that have a property.

    Attributes:
        applies: Whether a model has the property.
        readers: Names of the readers.
        status: How their vectors compare with the model's.
        reason: Why, and what to do. {pooling} and {rope} stand for those of the model.
        is_announced: Whether export also logs the rule.
    """

    applies: Callable[[ServedModel], bool]
    readers: tuple[str, ...]
    status: Status
    reason: str
    is_announced: bool = True


def is_bidirectional_decoder(model: ServedModel) -> bool:
    """Return whether the model is a decoder with a bidirectional mask."""
    return model.spec.attention != "causal" and not model.is_encoder


def has_new_mask(model: ServedModel) -> bool:
    """Return whether the mask is one that transformers before 5.2 ignores."""
    return is_bidirectional_decoder(model) and FAMILIES[model.transformer.family].bidirectional_since == "5.2"


def has_own_weights(model: ServedModel) -> bool:
    """Return whether the pooling has weights, which only our own module reads."""
    return model.spec.pooling in TRAINABLE_POOLINGS


def has_unserved_pooling(model: ServedModel) -> bool:
    """Return whether servers lack the pooling."""
    return model.spec.pooling not in SERVED_POOLINGS


def runs_on_tei_cpus(model: ServedModel) -> bool:
    """Return whether TEI computes the model on CPUs, in float32."""
    return model.transformer.family in ("qwen3", "gemma3_text") or model.is_encoder or model.has_onnx


def has_head_width_unlike_tei(model: ServedModel) -> bool:
    """Return whether the head width differs from the one that TEI computes for this family."""
    transformer = model.transformer
    return transformer.family in ("mistral", "llama") and transformer.head_width * transformer.heads != transformer.width


def has_bias_unlike_tei(model: ServedModel) -> bool:
    """Return whether the attention has biases that TEI ignores for this family."""
    return model.transformer.out_bias and model.transformer.family in ("qwen3", "llama")


TORCH_SENTENCE_TRANSFORMERS = ("sentence-transformers 6", "sentence-transformers 5", "sentence-transformers 3, 4")
STORES = "Chroma, LanceDB"
FRAMEWORKS = ("LangChain", "LlamaIndex")
SERVERS = ("vLLM", "TEI", "llama.cpp")
COMPARED_DECODERS = frozenset({"qwen2", "qwen3", "mistral", "llama"})  # with servers

READER_RULES = (
    Rule(
        has_new_mask, ("transformers",), Status.CONDITIONAL,
        "from transformers 5.2; 5.0 and 5.1 silently apply a causal mask, 4 refuses the tokenizer", False,
    ),
    Rule(
        has_new_mask, ("sentence-transformers 6", *FRAMEWORKS, STORES), Status.CONDITIONAL,
        "from transformers 5.2; refuses older ones", False,
    ),
    Rule(
        has_new_mask, ("sentence-transformers 5",), Status.CONDITIONAL,
        "from transformers 5.2; 5.0 and 5.1 silently apply a causal mask, 4 refuses the tokenizer", False,
    ),
    Rule(
        has_new_mask, ("sentence-transformers 3, 4", "infinity"), Status.REFUSED,
        "a bidirectional model needs transformers 5.2 or newer",
    ),
    Rule(
        lambda model: is_bidirectional_decoder(model) and not has_new_mask(model),
        ("transformers", *TORCH_SENTENCE_TRANSFORMERS, *FRAMEWORKS, STORES, "infinity"), Status.CONDITIONAL,
        "from transformers 4.57; older ones silently apply a causal mask", False,
    ),
    Rule(is_bidirectional_decoder, ("llama.cpp",), Status.CONDITIONAL, "with one slot or a unified KV cache", False),
    Rule(
        lambda model: has_unserved_pooling(model) and not model.has_onnx, SERVERS, Status.REFUSED,
        "has no {pooling} pooling",
    ),
    Rule(
        lambda model: has_unserved_pooling(model) and model.has_onnx, ("vLLM", "llama.cpp"), Status.REFUSED,
        "has no {pooling} pooling",
    ),
    Rule(
        lambda model: has_unserved_pooling(model) and model.has_onnx, ("TEI",), Status.CONDITIONAL,
        "on the CPU image, whose ONNX graph contains the pooling; --pooling mean only passes a check", False,
    ),
    Rule(has_own_weights, ("infinity",), Status.REFUSED, "does not run token_pooling.py"),
    Rule(
        lambda model: model.leaves_out_instructions, (*SERVERS, "ONNX Runtime", "OpenVINO", STORES), Status.DIFFERENT,
        "pools the instruction tokens of a prompt, which this model leaves out (model.pooling.include_instruction: false); "
        "texts without a prompt are equal",
    ),
    Rule(lambda model: model.spec.projection > 0, ("llama.cpp",), Status.DIFFERENT, "leaves out the projection"),
    Rule(
        lambda model: model.dtype == "bfloat16", ("TEI",), Status.CLOSE, "computes in float16 or float32, not in bfloat16",
    ),
    Rule(
        lambda model: not runs_on_tei_cpus(model), ("TEI",), Status.CLOSE,
        "runs this family only on NVIDIA GPUs, in float16", False,
    ),
    Rule(
        lambda model: model.rope_type != "default" and model.transformer.family == "llama", ("TEI",), Status.REFUSED,
        "has no RoPE scaling for this family",
    ),
    Rule(
        lambda model: model.rope_type != "default" and model.transformer.family.startswith("qwen"), ("TEI",), Status.DIFFERENT,
        "leaves out the RoPE scaling ({rope})",
    ),
    Rule(
        lambda model: model.rope_type == "linear" and model.transformer.family == "mistral", ("TEI",), Status.DIFFERENT,
        "computes another RoPE scaling than linear",
    ),
    Rule(lambda model: model.rope_type == "llama3", ("llama.cpp",), Status.REFUSED, "has no such RoPE scaling (llama3)"),
    Rule(
        lambda model: model.transformer.family not in COMPARED_DECODERS, ("TEI",), Status.CONDITIONAL,
        "if it has this family, which was not compared", False,
    ),
    Rule(
        lambda model: model.transformer.family not in COMPARED_DECODERS | {"bert"}, ("llama.cpp",), Status.CONDITIONAL,
        "if it has this family, which was not compared", False,
    ),
    Rule(
        lambda model: model.rope_type == "yarn", ("vLLM", "llama.cpp"), Status.CONDITIONAL,
        "if it computes this RoPE scaling (yarn) alike, which was not compared",
    ),
    Rule(
        lambda model: model.has_window and model.transformer.family in COMPARED_DECODERS, ("llama.cpp",), Status.DIFFERENT,
        "computes no sliding window",
    ),
    Rule(
        lambda model: any(model.transformer.windows) and model.transformer.family.startswith("qwen"), ("TEI",), Status.REFUSED,
        "has no sliding windows for this family",
    ),
    Rule(
        lambda model: model.has_window and model.transformer.family == "mistral", ("TEI",), Status.DIFFERENT,
        "computes another sliding window",
    ),
    Rule(has_head_width_unlike_tei, ("TEI",), Status.REFUSED, "expects heads of hidden_size / num_attention_heads numbers"),
    Rule(has_bias_unlike_tei, ("TEI",), Status.DIFFERENT, "leaves out biases of the attention"),
    Rule(
        lambda model: not model.has_onnx, ("ONNX Runtime", "OpenVINO"), Status.REFUSED,
        "needs a graph: export with --onnx", False,
    ),
    Rule(
        lambda model: bool(model.spec.matryoshka_dims), (*TORCH_SENTENCE_TRANSFORMERS, *FRAMEWORKS), Status.CONDITIONAL,
        "truncate_dim needs normalize_embeddings=True, because it truncates after the normalization",
    ),
    Rule(
        lambda model: True, ("sentence-transformers 3, 4", "infinity"), Status.CONDITIONAL,
        "for texts without leading or trailing white space, which it removes", False,
    ),
    Rule(
        lambda model: True, ("sentence-transformers 5",), Status.CONDITIONAL,
        "its versions up to 5.1 strip white space", False,
    ),
    Rule(
        lambda model: True, ("OpenVINO",), Status.CONDITIONAL,
        'with this graph; backend="openvino" of sentence-transformers converts the model itself, to other vectors for some '
        "families", False,
    ),
    Rule(
        lambda model: bool(model.spec.plain_prompt), (STORES,), Status.DIFFERENT,
        "puts the default prompt before queries too, whose own prompt is part of the text", False,
    ),
    Rule(lambda model: True, ("LangChain",), Status.CONDITIONAL, "for texts without line breaks, which become spaces", False),
    Rule(
        lambda model: True, ("vLLM",), Status.CONDITIONAL,
        "texts beyond the maximum length need `truncate_prompt_tokens: -1` in the request", False,
    ),
    Rule(
        lambda model: True, ("llama.cpp",), Status.CONDITIONAL,
        "for texts up to the maximum length, because it does not truncate", False,
    ),
    Rule(
        lambda model: True, ("llama.cpp",), Status.CONDITIONAL,
        "if the converter knows the tokenizer, which it does not if it was trained from scratch", False,
    ),
)  # fmt: skip


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
    # The converter stores the pooling for some families alone.
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
    """Return one line for each announced rule: which readers give other vectors than the model, or none, and why.

    For a reader that refuses the model, one reason is enough.
    """
    refusing = {verdict.reader.name for verdict in judge_readers(model) if verdict.status == Status.REFUSED}
    lines, refused = [], set[str]()
    for rule in (rule for rule in READER_RULES if rule.is_announced and rule.applies(model)):
        candidates = refusing - refused if rule.status == Status.REFUSED else set(rule.readers) - refusing
        if names := [name for name in rule.readers if name in candidates]:
            status = "" if rule.status == Status.CONDITIONAL else f"{rule.status}: "
            lines.append(f"{', '.join(names)}: {status}{_format_reason(rule, model)}")
        if rule.status == Status.REFUSED:
            refused |= set(names)
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
