"""Rules that describe how other programs handle an exported folder.

A rule names a property of a model, the readers that it affects, and what they do. A reader without an applying rule computes
the vectors of the model.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.formats.stock_files import SERVED_POOLINGS
from jaxembed.model.families import FAMILIES, TransformerConfig, find_window_group
from jaxembed.model.masks import MASKS
from jaxembed.model.pooling import TRAINABLE_POOLINGS


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
    """The properties of an exported folder that determine how readers treat it.

    Attributes:
        spec: How texts become vectors.
        transformer: The transformer.
        dtype: Dtype of the weights.
        has_onnx: Whether the folder has an ONNX graph of the whole model, onnx/model.onnx.
        has_head: Whether the folder has a language-model head of its own, lm_head.weight.
    """

    spec: EmbeddingSpec
    transformer: TransformerConfig
    dtype: str = "float32"
    has_onnx: bool = False
    has_head: bool = False

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
        windows = self.transformer.get_windows(MASKS[self.spec.attention])
        return any(window is not None and window < self.spec.max_length for window in windows)

    @property
    def leaves_out_instructions(self) -> bool:
        """Whether the pooling skips tokens of an instruction that it could reach."""
        return not self.spec.include_instruction and self.spec.pooling != "last"


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
    if model.is_encoder:
        return model.has_onnx or model.spec.pooling != "last"
    return model.has_onnx or model.transformer.family in ("qwen3", "gemma3_text")


def has_head_width_unlike_tei(model: ServedModel) -> bool:
    """Return whether the head width differs from the one that TEI computes for this family."""
    transformer = model.transformer
    return transformer.family in ("mistral", "llama") and transformer.head_width * transformer.heads != transformer.width


def has_bias_unlike_tei(model: ServedModel) -> bool:
    """Return whether the attention has biases that TEI ignores for this family."""
    return model.transformer.out_bias and model.transformer.family in ("qwen3", "llama")


def has_irregular_windows(model: ServedModel) -> bool:
    """Return whether the layers form no groups of equal size with one layer without a window each."""
    return FAMILIES[model.transformer.family].window == "grouped" and find_window_group(model.transformer) is None


def has_unapplied_mask(model: ServedModel) -> bool:
    """Return whether TEI leaves out a mask: that of Gemma 3, in a batch without padding."""
    return model.transformer.family == "gemma3_text" and (model.spec.attention == "causal" or model.has_window)


TORCH_SENTENCE_TRANSFORMERS = ("sentence-transformers 6", "sentence-transformers 5", "sentence-transformers 3, 4")
STORES = "Chroma, LanceDB"
FRAMEWORKS = ("LangChain", "LlamaIndex")
SERVERS = ("vLLM", "TEI", "llama.cpp")
COMPARED_DECODERS = frozenset({"qwen2", "qwen3", "mistral", "llama"})  # with servers

# What TEI's own models (of its backend candle) do. Its CPU image runs the ONNX graph instead, if there is one.
CANDLE_RULES = (
    Rule(
        lambda model: not runs_on_tei_cpus(model), ("TEI",), Status.CLOSE,
        "runs this model only on NVIDIA GPUs, in float16", False,
    ),
    Rule(
        lambda model: model.transformer.activation == "gelu", ("TEI",), Status.CLOSE,
        "computes GELU in its tanh approximation (all-MiniLM-L6-v2: cosine 0.999999)", False,
    ),
    Rule(
        lambda model: model.spec.pooling == "first" and model.transformer.family == "gemma3_text", ("TEI",), Status.REFUSED,
        "has no first-token pooling for this family",
    ),
    Rule(
        has_unapplied_mask, ("TEI",), Status.DIFFERENT,
        "applies no mask and no sliding window to a batch of several texts of equal length",
    ),
    Rule(has_irregular_windows, ("TEI",), Status.REFUSED, "has only groups of layers with one layer without a window each"),
    Rule(
        lambda model: model.rope_type != "default" and model.transformer.family == "llama", ("TEI",), Status.REFUSED,
        "has no RoPE scaling for this family",
    ),
    Rule(
        lambda model: model.rope_type != "default" and model.transformer.family not in ("llama", "mistral"), ("TEI",),
        Status.DIFFERENT, "leaves out the RoPE scaling ({rope})",
    ),
    Rule(
        lambda model: model.rope_type in ("linear", "yarn") and model.transformer.family == "mistral", ("TEI",),
        Status.DIFFERENT, "computes a different RoPE scaling from {rope}",
    ),
    Rule(
        lambda model: any(model.transformer.windows) and model.transformer.family.startswith("qwen"), ("TEI",), Status.REFUSED,
        "has no sliding windows for this family",
    ),
    Rule(
        lambda model: model.has_window and model.transformer.family == "mistral", ("TEI",), Status.DIFFERENT,
        "computes a different sliding window",
    ),
    Rule(has_head_width_unlike_tei, ("TEI",), Status.REFUSED, "expects a head width of hidden_size / num_attention_heads"),
    Rule(has_bias_unlike_tei, ("TEI",), Status.DIFFERENT, "leaves out biases of the attention"),
)  # fmt: skip


def _split_by_graph(rule: Rule) -> tuple[Rule, Rule]:
    """Return a rule of TEI's own models for folders without a graph, and one for folders with a graph."""
    reason = f"on the CPU image, which runs the ONNX graph; another image {rule.reason}"
    return (
        dataclasses.replace(rule, applies=lambda model: not model.has_onnx and rule.applies(model)),
        Rule(lambda model: model.has_onnx and rule.applies(model), ("TEI",), Status.CONDITIONAL, reason, False),
    )


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
    Rule(lambda model: model.rope_type == "llama3", ("llama.cpp",), Status.REFUSED, "has no such RoPE scaling (llama3)"),
    Rule(
        lambda model: model.has_head and model.transformer.family in ("qwen2", "llama"), ("llama.cpp",), Status.CONDITIONAL,
        "if the converter knows the head (lm_head.weight) of this class: that of llama-cpp-python 0.3.36 does, that of gguf "
        "0.19 does not", False,
    ),
    Rule(
        lambda model: model.transformer.family not in COMPARED_DECODERS | {"bert"}, ("llama.cpp",), Status.CONDITIONAL,
        "if it has this family, which was not compared", False,
    ),
    Rule(
        lambda model: model.rope_type == "yarn", ("vLLM", "llama.cpp"), Status.CONDITIONAL,
        "if it computes this RoPE scaling (yarn) in the same way, which was not compared",
    ),
    Rule(
        lambda model: model.has_window and model.transformer.family in COMPARED_DECODERS, ("llama.cpp",), Status.DIFFERENT,
        "has no sliding windows",
    ),
    Rule(
        lambda model: model.transformer.family == "modernbert" and has_irregular_windows(model),
        ("transformers", *TORCH_SENTENCE_TRANSFORMERS, "infinity"), Status.CONDITIONAL,
        "from transformers 5; version 4 applies the sliding window to other layers",
    ),
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
    *(split for rule in CANDLE_RULES for split in _split_by_graph(rule)),
)  # fmt: skip
