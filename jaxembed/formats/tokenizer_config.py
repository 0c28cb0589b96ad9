"""Read tokenizer_config.json. Only this module decides which special tokens the tokenizer of a folder adds.

Saves of transformers 4 may leave BOS and EOS to the flags `add_bos_token` and `add_eos_token` of this file, while
tokenizer.json adds neither. transformers 5 does not read the flags of a folder that has a tokenizer.json.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from tokenizers import processors

from jaxembed.config.field_lists import FieldList, log_once
from jaxembed.config.fields import Fields
from jaxembed.data.tokenize import ends_with_eos, load_tokenizer, starts_with_bos
from jaxembed.errors import UserError
from jaxembed.files import exists, read_json

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FIELDS = FieldList(
    read=frozenset({"add_bos_token", "add_eos_token", "truncation_side"}),
    # What transformers applies when it loads the tokenizer, and what matters only to chats, batches, and slow tokenizers.
    harmless=frozenset(
        {
            "add_prefix_space", "added_tokens_decoder", "additional_special_tokens", "audio_token", "auto_map", "backend",
            "bos_token", "chat_template", "clean_up_tokenization_spaces", "cls_token", "eos_token", "errors",
            "extra_special_tokens", "fix_mistral_regex", "image_token", "init_inputs", "is_local", "legacy",
            "local_files_only", "mask_token", "max_length", "model_input_names", "model_max_length",
            "model_specific_special_tokens", "name_or_path", "pad_to_multiple_of", "pad_token", "pad_token_type_id",
            "padding_side", "processor_class", "response_schema", "sep_token", "sp_model_kwargs",
            "spaces_between_special_tokens", "special_tokens_map_file", "stride", "token_type_ids_include_special_tokens",
            "token_type_ids_pattern", "tokenizer_class", "tokenizer_file", "truncation_strategy", "trust_remote_code",
            "unk_token", "use_default_system_prompt", "use_fast", "video_token", "vocab_file", "do_lower_case",
            "do_basic_tokenize", "never_split", "strip_accents", "tokenize_chinese_chars", "wordpieces_prefix", "max_len",
            "trim_offsets", "spm_file", "clean_text", "model_type",
        }
    ),
    refused={"split_special_tokens": (False,)},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerFlags:
    """The flags of a tokenizer_config.json; None for a missing flag.

    Attributes:
        add_bos: Whether texts start with BOS.
        add_eos: Whether texts end with EOS.
    """

    add_bos: bool | None = None
    add_eos: bool | None = None


def read_tokenizer_flags(folder: Path) -> TokenizerFlags:
    """Read the flags of a folder's tokenizer_config.json.

    Raises:
        UserError: A flag is neither true nor false, or the file asks for something that is not implemented.
    """
    path = folder / TOKENIZER_CONFIG_FILE
    if not exists(path):
        return TokenizerFlags()
    values = read_json(path)
    TOKENIZER_FIELDS.check(values, str(path))
    fields = Fields(values, str(path))
    add_bos, add_eos = (None if values.get(key) is None else fields.boolean(key) for key in ("add_bos_token", "add_eos_token"))
    return TokenizerFlags(add_bos, add_eos)


def load_folder_tokenizer(folder: Path, *, is_trained_embedder: bool = False) -> Any:
    """Load the fast tokenizer of a model folder. It adds BOS if tokenizer.json or the flags say so.

    EOS is left to `append_eos` of the spec, which `wants_eos` decides for a foreign folder. Long texts are always truncated at
    their end.

    Args:
        folder: The folder.
        is_trained_embedder: Whether the folder is an embedding model, whose truncation side must be kept.

    Raises:
        UserError: The folder has no fast tokenizer, or one that asks for something that is not implemented.
    """
    flags, tokenizer = read_tokenizer_flags(folder), load_tokenizer(folder)
    if tokenizer.init_kwargs.pop("auto_map", None):  # the tokenizer is a stock one, and is saved as such
        log_once(f"{folder / TOKENIZER_CONFIG_FILE}: names Python code (auto_map), which is not run", logging.INFO)
    starts = starts_with_bos(tokenizer)
    if flags.add_bos and not starts:
        if tokenizer.bos_token_id is None:
            raise UserError(
                f"{folder / TOKENIZER_CONFIG_FILE}: add_bos_token is true, but the tokenizer has no BOS token. Set "
                "bos_token, or add_bos_token to false."
            )
        _prepend_bos(tokenizer)
    for key, flag, is_added in (("bos", flags.add_bos, starts), ("eos", flags.add_eos, ends_with_eos(tokenizer))):
        if flag is False and is_added:
            log_once(
                f"{folder}: add_{key}_token is false, but tokenizer.json adds the token; it is added, as in transformers 5"
            )
    if tokenizer.truncation_side != "right":
        _truncate_at_end(tokenizer, folder, is_trained_embedder)
    return tokenizer


def wants_eos(folder: Path, tokenizer: Any) -> bool:
    """Return whether the texts of a folder end with EOS, by its tokenizer.json or by the flag `add_eos_token`.

    Args:
        folder: Folder of the tokenizer.
        tokenizer: What `load_folder_tokenizer` returned.
    """
    return ends_with_eos(tokenizer) or bool(read_tokenizer_flags(folder).add_eos)


def _truncate_at_end(tokenizer: Any, folder: Path, is_trained_embedder: bool) -> None:
    """Make a tokenizer truncate long texts at their end, unless its model was trained with texts truncated at their start."""
    problem = f"{folder}: truncation_side is left in {TOKENIZER_CONFIG_FILE} or tokenizer.json"
    if is_trained_embedder:
        raise UserError(
            f"{problem}, so that long texts lose their start, which is not supported (expected right). If all texts are short, "
            "change it in a copy."
        )
    log_once(f"{problem}; jaxembed truncates long texts at their end")
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "right"
    tokenizer.backend_tokenizer.no_truncation()


def _prepend_bos(tokenizer: Any) -> None:
    """Make the post-processor also start every text with BOS."""
    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    backend.post_processor = (
        template if backend.post_processor is None else processors.Sequence([backend.post_processor, template])
    )
