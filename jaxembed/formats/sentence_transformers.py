"""Sentence-transformers folders: their modules, their spec, and our module for token poolings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxembed.config.field_lists import FieldList, log_once
from jaxembed.config.fields import Fields
from jaxembed.config.model import PoolingKind
from jaxembed.config.spec import MAX_HIDDEN_PROJECTIONS, EmbeddingSpec, HiddenProjection
from jaxembed.errors import UserError
from jaxembed.files import compute_file_digest, exists, read_json, read_json_value
from jaxembed.formats.tokenizer_config import load_folder_tokenizer, wants_eos
from jaxembed.model.embedder import PROJECTION_ACTIVATIONS
from jaxembed.model.families import FAMILIES, TransformerConfig

MODULES_FILE = "modules.json"
MAX_PROJECTION_WIDTH = 2**16  # as of the spec
MODULE_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")  # the modules that are supported, in their order
# sentence-transformers' names of the poolings without weights, and the suffixes of the flags in its older files.
POOLING_MODES: dict[PoolingKind, str] = {
    "mean": "mean",
    "last": "lasttoken",
    "first": "cls",
    "max": "max",
    "weighted_mean": "weightedmean",
}
POOLING_FLAGS: dict[PoolingKind, str] = {
    "mean": "mean_tokens",
    "last": "lasttoken",
    "first": "cls_token",
    "max": "max_tokens",
    "weighted_mean": "weightedmean_tokens",
}
# Names of the config of a Transformer module. Versions before 2021 name it after the family; the first that exists is read.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
TRANSFORMER_FIELDS = FieldList(  # of these files
    read=frozenset({"max_seq_length", "modality_config"}),
    harmless=frozenset({"unpad_inputs"}),
    refused={
        "tokenizer_name_or_path": (),
        "do_lower_case": (False,), "transformer_task": ("feature-extraction",), "module_output_name": ("token_embeddings",),
        "processing_kwargs": (), "query_length": (), "document_length": (), "query_expansion": (False,), "model_args": (),
        "model_kwargs": (), "tokenizer_args": (), "processor_kwargs": (), "config_args": (), "config_kwargs": (),
    },
)  # fmt: skip
PLAIN_TEXTS = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}  # the supported modality_config
POOLING_FIELDS = FieldList(
    read=frozenset({"pooling_mode", "include_prompt", *(f"pooling_mode_{flag}" for flag in POOLING_FLAGS.values())}),
    harmless=frozenset({"embedding_dimension", "word_embedding_dimension"}),
    refused={"pooling_mode_mean_sqrt_len_tokens": (False,)},
)
DENSE_FIELDS = FieldList(
    read=frozenset(
        {
            "in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name",
            "use_residual",
        }
    ),
    harmless=frozenset(),
    refused={},
)  # fmt: skip
NORMALIZE_FIELDS = FieldList(
    read=frozenset(),
    harmless=frozenset(),
    refused={"module_input_name": ("sentence_embedding",), "module_output_name": ("sentence_embedding",)},
)
MODEL_FIELDS = FieldList(  # of config_sentence_transformers.json
    read=frozenset({"prompts", "default_prompt_name", "similarity_fn_name"}),
    harmless=frozenset({"__version__", "requirements"}),
    refused={"model_type": ("SentenceTransformer",), "truncate_dim": ()},
)
E5_PROMPT = re.compile(r"Instruct: .+?( ?\n ?Query: ?)", re.DOTALL)  # form of E5's stored prompts
# The PyTorch module of poolings with weights. Export copies this file into the folder of the model.
TOKEN_POOLING_FILE = Path(__file__).with_name("token_pooling.py")
TOKEN_POOLING_TYPE = f"{TOKEN_POOLING_FILE.stem}.TokenPooling"  # its type in modules.json
STOCK_TYPE = re.compile(r"sentence_transformers(\.\w+)+")  # types of sentence-transformers' own classes
# SHA-256 of the versions of this file in models that older versions exported. Add the last one before the file changes:
# folders with other versions are refused.
EARLIER_TOKEN_POOLING_DIGESTS = frozenset(
    {
        "8a1a3602c7515bc20e5fb86c1eec16ec83c197042fe78d89d5d39070abe972a8",
        "1be1d0c7b6e0545011273d5397527547b89732883b7dea721de03075d38325fc",
        "61b583d85923382c6abf090f2a5039fdf5a90df002a219235c49026379f66fe6",
        "59aa31bc580d11d3ded36e26ada2de1e322af3d04dc6a1eec610dbbdd4ad390e",
        "b5b0e31df06691427f9f2b97e607515d96564f57547fef67b95572c7e1e67193",
        "f72894e7e09ec6b1879886225b8a4c385e00b9b0c5113a941db9d82d987d25d9",
    }
)


def has_own_token_pooling(folder: Path) -> bool:
    """Return whether the Python file of the token pooling in `folder` is one that jaxembed wrote, so that it is safe to run."""
    path = folder / TOKEN_POOLING_FILE.name
    return path.is_file() and compute_file_digest(path) in {
        compute_file_digest(TOKEN_POOLING_FILE),
        *EARLIER_TOKEN_POOLING_DIGESTS,
    }


def read_modules(folder: Path) -> list[tuple[str, Path]]:
    """Return the kind and folder of each module that a folder lists, in order; none if it lists none.

    Raises:
        UserError: The list is malformed, or a module is neither sentence-transformers' nor ours.
    """
    listing = folder / MODULES_FILE
    if not exists(listing):
        return []
    try:
        modules = [(str(m["type"]), folder / str(m["path"])) for m in read_json_value(listing)]
    except (TypeError, KeyError):
        raise UserError(
            f"{listing}: not a list of modules (expected each with type and path). Download or export it again."
        ) from None
    for kind, _ in modules:
        if kind != TOKEN_POOLING_TYPE and not STOCK_TYPE.fullmatch(kind):
            raise UserError(
                f"{listing}: module type {kind[:80]!r} is the folder's own Python code, which is not run (expected modules of "
                "sentence_transformers). Use another model."
            )
    for _, path in modules:
        if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
            raise UserError(f"{listing}: module path {str(path)[-80:]!r} is outside the folder. Move the module into it.")
    return [(kind.rsplit(".", 1)[-1], path) for kind, path in modules]


def find_projection_weights(folder: Path) -> list[Path]:
    """Return the weight files of a folder's Dense modules, in their order."""
    return [path / "model.safetensors" for kind, path in read_modules(folder) if kind == "Dense"]


def read_projection_choices(folders: Sequence[Path], width: int) -> dict[str, Any]:
    """Read the configs of Dense modules.

    Args:
        folders: Folders of the modules, in their order.
        width: Width of the vectors before them.

    Returns:
        The fields of `EmbeddingSpec` that describe the projection.

    Raises:
        UserError: A module is more than a matrix, a bias and a supported activation, their widths do not chain, or there are
            too many.
    """
    if len(folders) > MAX_HIDDEN_PROJECTIONS + 1:
        raise UserError(f"{folders[-1]}: {len(folders)} Dense modules are too many (expected {MAX_HIDDEN_PROJECTIONS + 1}).")
    layers: list[HiddenProjection] = []
    for folder in folders:
        layers.append(_read_dense(folder, layers[-1].width if layers else width))
    if not layers:
        return {}
    *hidden, last = layers
    return {
        "hidden_projections": tuple(hidden),
        "projection": last.width,
        "projection_bias": last.bias,
        "projection_activation": last.activation,
    }


def _read_dense(dense: Path, width: int) -> HiddenProjection:
    """Read the config of a Dense module. Its input must have the width of the vectors before it."""
    where = str(dense / "config.json")
    config = read_json(dense / "config.json")
    DENSE_FIELDS.check(config, where)
    fields = Fields(config, where)
    torch_activation = fields.string("activation_function", "torch.nn.modules.activation.Tanh")
    activation = torch_activation.rsplit(".", 1)[-1].lower()
    if activation not in PROJECTION_ACTIVATIONS or not torch_activation.startswith("torch.nn."):
        raise UserError(
            f"{where}: activation_function {torch_activation} is not supported (expected Identity or Tanh of torch.nn)."
        )
    in_features = fields.integer("in_features", maximum=MAX_PROJECTION_WIDTH)
    if in_features != width:
        raise UserError(f"{where}: in_features is {in_features} (expected {width}, the width of the vectors before it).")
    features = {fields.string(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")}
    if features != {"sentence_embedding"} or fields.boolean("use_residual"):
        raise UserError(
            f"{where}: this Dense module is not supported (expected input and output sentence_embedding, without use_residual)."
        )
    out_features = fields.integer("out_features", maximum=MAX_PROJECTION_WIDTH)
    return HiddenProjection(width=out_features, bias=fields.boolean("bias", True), activation=activation)


def read_sentence_transformers_spec(folder: Path, config: Mapping[str, Any], transformer: TransformerConfig) -> EmbeddingSpec:
    """Read a spec from modules.json and the files that it names.

    Args:
        folder: Sentence-transformers folder.
        config: Content of its config.json.
        transformer: The transformer that `config` describes.

    Raises:
        UserError: The folder has a module, or an order of modules, that is not supported.
    """
    modules = read_modules(folder)
    module_folders = dict(modules)
    dense_folders = [path for kind, path in modules if kind == "Dense"]
    expected = [kind for kind in MODULE_ORDER for _ in (dense_folders if kind == "Dense" else [0]) if kind in module_folders]
    if [kind for kind, _ in modules] != expected or "Pooling" not in module_folders:
        kinds = ", ".join(kind for kind, _ in modules) or "none"
        raise UserError(
            f"{folder / MODULES_FILE}: these modules are not supported (found {kinds}; expected {', '.join(MODULE_ORDER)} or "
            "some of them, Pooling among them)."
        )
    pooling_path = module_folders["Pooling"] / "config.json"
    pooling_config = read_json(pooling_path)
    POOLING_FIELDS.check(pooling_config, str(pooling_path))
    has_norm = "Normalize" in module_folders
    if has_norm:
        normalize_path = module_folders["Normalize"] / "config.json"
        NORMALIZE_FIELDS.check(_read_if_present(normalize_path), str(normalize_path))
    tokenizer = load_folder_tokenizer(folder, is_trained_embedder=True)
    projection = read_projection_choices(dense_folders, transformer.width)
    config_path = str(folder / "config.json")
    prompts = _read_prompts(folder / "config_sentence_transformers.json", has_norm)
    return EmbeddingSpec(
        attention=read_attention(config, transformer.family, config_path),
        pooling=_read_pooling_kind(pooling_config, pooling_path),
        include_instruction=Fields(pooling_config, str(pooling_path)).boolean("include_prompt", True),
        **projection,
        normalize=has_norm,
        append_eos=wants_eos(folder, tokenizer),
        max_length=_read_max_length(folder, transformer, tokenizer),
        **prompts,
        # An encoder reads its own prompts, unless they show a template of instructions.
        fixed_prompts=FAMILIES[transformer.family].is_encoder and "instruction_template" not in prompts,
        matryoshka_dims=_read_matryoshka_dims(config, projection.get("projection", transformer.width), config_path),
    )


def read_attention(config: Mapping[str, Any], family: str, where: str) -> Literal["causal", "bidirectional"]:
    """Return the mask that transformers gives a model.

    Args:
        config: Content of its config.json.
        family: Family of the transformer.
        where: Path of the config, for errors.
    """
    fields = Fields(config, where)
    if FAMILIES[family].mask_field == "use_bidirectional_attention":
        is_causal = not fields.boolean("use_bidirectional_attention")
    else:
        is_causal = not FAMILIES[family].is_encoder and fields.boolean("is_causal", True)
    return "causal" if is_causal else "bidirectional"


def _read_matryoshka_dims(config: Mapping[str, Any], width: int, where: str) -> tuple[int, ...]:
    """Return the widths below `width` to which vectors may be truncated, in ascending order."""
    dims = config.get("matryoshka_dimensions") or []
    if not isinstance(dims, list) or any(not isinstance(dim, int) or isinstance(dim, bool) or dim < 1 for dim in dims):
        raise UserError(f"{where}: matryoshka_dimensions is {dims!r:.80}; expected a list of positive integers")
    return tuple(sorted(dim for dim in dims if dim < width))


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_prompts(path: Path, has_norm: bool) -> dict[str, Any]:
    """Return the fields of `EmbeddingSpec` that config_sentence_transformers.json describes."""
    config = _read_if_present(path)
    MODEL_FIELDS.check(config, str(path))
    fields = Fields(config, str(path))
    prompts, default_name = fields.strings("prompts"), fields.string("default_prompt_name", "")
    if default_name and default_name not in prompts:
        raise UserError(
            f"{path}: default_prompt_name is {default_name!r} (expected one of {', '.join(prompts) or 'no prompts'})."
        )
    similarity = fields.string("similarity_fn_name", "cosine")
    if similarity not in ("cosine", "dot") or (similarity == "dot" and not has_norm):
        log_once(
            f"{path}: similarity_fn_name is {similarity}; jaxembed scales every vector to unit length and compares by cosine"
        )
    return {
        "prompts": prompts,
        **_infer_template(prompts.values()),
        "plain_prompt": prompts.get(default_name, ""),
    }


def _read_pooling_kind(config: Mapping[str, Any], path: Path) -> PoolingKind:
    """Return our name of a stock pooling. Newer files name its mode, older ones have a flag for each."""
    mode = config.get("pooling_mode")
    if mode is None:
        matches = [kind for kind, flag in POOLING_FLAGS.items() if config.get(f"pooling_mode_{flag}")]
    else:
        matches = [kind for kind, stock_mode in POOLING_MODES.items() if mode == stock_mode]
    if len(matches) != 1:
        raise UserError(f"{path}: this pooling is not supported (expected one of {', '.join(POOLING_MODES.values())}).")
    return matches[0]


def _read_max_length(folder: Path, transformer: TransformerConfig, tokenizer: Any) -> int:
    """Return max_seq_length of the config of the Transformer, otherwise the limit of the tokenizer or the transformer."""
    paths = [folder / name for name in TRANSFORMER_FILES]
    path = next((path for path in paths if path.is_file()), paths[0])
    config = _read_if_present(path)
    TRANSFORMER_FIELDS.check(config, str(path))
    _check_modalities(Fields(config, str(path)).mapping("modality_config", PLAIN_TEXTS), path)
    limit = min(int(tokenizer.model_max_length), transformer.max_positions)
    max_length = Fields(config, str(path)).integer("max_seq_length", limit)
    if max_length > transformer.max_positions:
        log_once(
            f"{path}: max_seq_length {max_length} is more than max_position_embeddings, so texts are truncated to "
            f"{transformer.max_positions} tokens; sentence-transformers truncates them later"
        )
    return max_length


def _check_modalities(modalities: Mapping[str, Any], path: Path) -> None:
    """Check that texts are read as they are. With "message", sentence-transformers wraps them in a chat template."""
    text = modalities.get("text")
    wrong = sorted(modalities.keys() - {"text"})
    if wrong or not isinstance(text, Mapping) or any(value != PLAIN_TEXTS["text"].get(key) for key, value in text.items()):
        raise UserError(
            f"{path}: modality_config is not supported (found {', '.join(wrong) or 'another text method'}; expected text "
            "alone, as the last hidden state of the transformer). Use a model of plain texts."
        )


def _infer_template(prompts: Iterable[str]) -> dict[str, str]:
    """Return the `instruction_template` that all stored prompts of the form "Instruct: ..." share, or nothing."""
    matches = (E5_PROMPT.fullmatch(prompt) for prompt in prompts)
    templates = {match.expand(r"Instruct: {instruction}\1") for match in matches if match}
    return {"instruction_template": templates.pop()} if len(templates) == 1 else {}
