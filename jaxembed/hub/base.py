"""What `model.base` or MODEL names: a preset, a Hugging Face or sentence-transformers folder, an earlier run, or a hub id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxembed.config import LoraConfig
from jaxembed.config.fields import Fields
from jaxembed.config.model import PoolingKind
from jaxembed.config.sections import parse_section
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.tokenize import ends_with_eos, load_tokenizer
from jaxembed.errors import UserError, brief
from jaxembed.files import exists, read_bytes, read_json, write_json
from jaxembed.formats.nv_embed import is_nv_embed, read_decoder_config, read_nv_embed_spec
from jaxembed.formats.peft import ADAPTER_CONFIG_FILE, is_peft_folder, read_base_name
from jaxembed.formats.published import PUBLISHED_LAYOUTS, find_first_stage_adapters, find_published_layout
from jaxembed.formats.sentence_transformers import MODULES_FILE, read_modules, read_projection_choices
from jaxembed.formats.weights import find_part_files
from jaxembed.model.families import DecoderConfig, from_hf, preset
from jaxembed.model.lora import LoRA
from jaxembed.training.checkpoint import Checkpoints, params_digest
from jaxembed.training.run_dir import RECORD, read_run_file

log = logging.getLogger("jaxembed")

SPEC_FILE = "jaxembed.json"
# Our poolings without weights -> sentence-transformers' names, and what its older files call their flags.
POOLING_MODES: dict[PoolingKind, str] = {
    "mean": "mean",
    "last": "lasttoken",
    "first": "cls",
    "max": "max",
    "weighted_mean": "weightedmean",
}
FLAGS: dict[PoolingKind, str] = {
    "mean": "mean_tokens", "last": "lasttoken", "first": "cls_token", "max": "max_tokens",
    "weighted_mean": "weightedmean_tokens",
}  # fmt: skip
E5_PROMPT = r"Instruct: .+?( ?\n ?Query: ?)"
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")  # of sentence-transformers that are read, in their order
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*/config.json"]


@dataclasses.dataclass(frozen=True)
class Base:
    """A decoder to start from. `folder` is None for a preset, which has neither weights nor a tokenizer; `adapters` are PEFT
    folders whose adapters are merged into the weights one after the other, and `root` is then the name of the weights. `run`
    is a run directory and the step of it that is the base, whose tokenizer alone is in `folder`.
    """

    name: str
    folder: Path | None
    hf_config: Mapping[str, Any]
    decoder: DecoderConfig
    spec: EmbeddingSpec
    adapters: tuple[Path, ...] = ()
    root: str = ""
    run: tuple[Path, int] | None = None

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the last adapters' folder that has one, else of the weights'."""
        assert self.folder is not None
        own = [folder for folder in self.adapters if exists(folder / "tokenizer.json")]
        return load_tokenizer([self.folder, *own][-1])


def find_base(name: str, asked_for_by: tuple[Path, ...] = ()) -> Base:
    """Resolves a name; `UserError` says what was looked for. `asked_for_by` are PEFT folders that lead to this base."""
    if name.startswith("preset:"):
        return _base(name, None, preset(name.removeprefix("preset:")), name)
    folder = find_folder(name)
    if exists(folder / RECORD):
        return _earlier_run(name, folder)
    if is_peft_folder(folder):
        if folder.resolve() in asked_for_by:
            told = "base_model_name_or_path leads back to this folder; name that of the weights"
            raise UserError(f"{folder / ADAPTER_CONFIG_FILE}: {told}")
        try:
            base = find_base(
                find_first_stage_adapters(name, folder) or read_base_name(folder), (*asked_for_by, folder.resolve())
            )
        except UserError as error:
            raise UserError(f"the base of the adapters in {folder}: {error}") from None
        own = read_json(folder / "config.json") if exists(folder / "config.json") else {}
        spec = read_spec(name, folder, own, base.decoder, base)
        return dataclasses.replace(base, name=name, root=base.root or base.name, spec=spec, adapters=(*base.adapters, folder))
    return _base(name, folder, read_json(folder / "config.json"), str(folder / "config.json"))


def _base(name: str, folder: Path | None, given: Mapping[str, Any], where: str) -> Base:
    """The base that a config.json (`given`) describes."""
    config = read_decoder_config(given, where)
    decoder = from_hf(config, where)
    return Base(name, folder, config, decoder, read_spec(name, folder, given, decoder))


def run_base(run_dir: Path) -> tuple[Base, Fields]:
    """What the model of a run is: its base's name and config, its own tokenizer and spec; and the record that says so."""
    where = str(run_dir / RECORD)
    record = Fields(read_run_file(read_json, run_dir / RECORD, "train anew"), where)
    config = record.mapping("config")
    decoder = from_hf(config, f"{where}: config")
    spec = read_spec(str(run_dir), run_dir, config, decoder)
    return Base(record.text("name"), run_dir / "tokenizer", config, decoder, spec), record


def recorded_lora(record: Fields, run_dir: Path) -> LoRA | None:
    """The adapters of a run, as its record tells of them."""
    values = record.mapping("lora", {})
    return LoRA(**dict(parse_section(LoraConfig, values, f"{run_dir / RECORD}: lora"))) if values else None


def _earlier_run(name: str, run_dir: Path) -> Base:
    """The best checkpoint of a run as a base; `UserError` where it has none, or is not one model but several adapters."""
    base, record = run_base(run_dir)
    lora = recorded_lora(record, run_dir)
    if lora is not None and len(lora.names) > 1:
        told = f"has several adapters ({', '.join(lora.names)})"
        raise UserError(f"{name}: {told}; export one (python -m jaxembed.export --adapter NAME) and name its folder")
    checkpoints = Checkpoints(run_dir)
    step = checkpoints.best()
    checkpoints.close()
    if step is None:
        raise UserError(f"{name}: this run holds no checkpoint; train it first")
    return dataclasses.replace(base, name=name, run=(run_dir, step))


def find_folder(name: str) -> Path:
    """A run directory, a local folder with a config.json, or the local copy of a hub repository, fetched if need be."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home of a user who is not there
        path = Path(name)
    if exists(path / "config.json") or exists(path / RECORD) or is_peft_folder(path):
        return path
    if exists(path) or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        if found := sorted(inner.parent.name for inner in path.glob(f"*/{ADAPTER_CONFIG_FILE}")):
            raise UserError(f"{name}: holds a folder for each of the adapters {', '.join(found)}; name one: {path / found[0]}")
        raise UserError(
            f"{name}: neither a folder with a config.json or an {ADAPTER_CONFIG_FILE}, nor a run directory, nor a hub id such "
            "as Qwen/Qwen2-0.5B"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else brief(error.__cause__ or error)
        told = f"no such folder, not in the hub's cache, and the hub was not reached ({why}); connect, or name a local folder"
        raise UserError(f"{name}: {told}") from None
    except Exception as error:  # authentication and file system errors of several libraries
        raise UserError(f"{name}: no such folder, and the hub gave no model of that name ({brief(error)})") from None


def read_spec(
    name: str, folder: Path | None, config: Mapping[str, Any], decoder: DecoderConfig, under: Base | None = None
) -> EmbeddingSpec:
    """What a folder says of its texts: in jaxembed.json, else in a published form, sentence-transformers' files, or our
    defaults. `name` is what the user asked for, `config` the folder's config.json, `under` the base of a folder of adapters;
    a preset has no folder.
    """
    if folder is not None and (folder / SPEC_FILE).is_file():
        return spec_from_json(read_json(folder / SPEC_FILE), str(folder / SPEC_FILE))
    if is_nv_embed(config):
        return read_nv_embed_spec(config, decoder, f"{name}: config.json")
    layout = find_published_layout(name, folder, config)
    listed = folder is not None and exists(folder / MODULES_FILE)
    if layout is None and not listed and under is None and "auto_map" in config:
        known = ", ".join(layout.title for layout in PUBLISHED_LAYOUTS)
        raise UserError(
            f"{folder}: its config.json asks for code of its own (auto_map), which is not run. Looked for {SPEC_FILE}, "
            f"sentence-transformers' {MODULES_FILE}, and the layouts of NV-Embed, {known}. If the weights are those of a "
            "plain decoder, take auto_map out of a copy"
        )
    spec = under.spec if under else EmbeddingSpec()
    if folder is not None and listed:
        spec = _sentence_transformers_spec(folder, config, decoder)
    if layout is not None:
        log.info("%s: read as %s", name, layout.title)
        choices = layout.get_spec_choices(folder, (under.root or under.name) if under else str(config.get("_name_or_path")))
        spec = spec.replace(**{**choices, "prompts": {**choices["prompts"], **spec.prompts}})
    return spec.replace(max_length=min(spec.max_length, decoder.max_positions))


def spec_from_json(values: Mapping[str, Any], where: str) -> EmbeddingSpec:
    """Parse a spec that `write_spec` wrote. null counts as absent.

    Raises:
        UserError: A key is unknown or has a wrong value; the line starts with `where`.
    """
    return parse_section(EmbeddingSpec, {key: value for key, value in values.items() if value is not None}, where)


def write_spec(folder: Path, spec: EmbeddingSpec) -> None:
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))


def _sentence_transformers_spec(folder: Path, config: Mapping[str, Any], decoder: DecoderConfig) -> EmbeddingSpec:
    """Reads modules.json and the files it names; `UserError` on a module that has no place here."""
    listed = read_modules(folder)
    kinds = dict(listed)
    if [kind for kind, _ in listed] != [kind for kind in MODULES if kind in kinds] or "Pooling" not in kinds:
        found = ", ".join(kind for kind, _ in listed) or "none"
        raise UserError(f"{folder / MODULES_FILE}: expected the modules {', '.join(MODULES)} or some of them; found {found}")
    pooling = read_json(kinds["Pooling"] / "config.json")
    tokenizer = load_tokenizer(folder)
    extra = folder / "config_sentence_transformers.json"
    prompts = Fields(read_json(extra) if extra.is_file() else {}, str(extra)).texts("prompts")
    return EmbeddingSpec(
        attention="causal" if Fields(config, str(folder / "config.json")).flag("is_causal", True) else "bidirectional",
        pooling=_pooling_kind(pooling, kinds["Pooling"]),
        include_instruction=Fields(pooling, str(kinds["Pooling"] / "config.json")).flag("include_prompt", True),
        **(read_projection_choices(kinds["Dense"], decoder.width) if "Dense" in kinds else {}),
        normalize="Normalize" in kinds,
        append_eos=ends_with_eos(tokenizer) or bool(tokenizer.init_kwargs.get("add_eos_token")),
        max_length=_max_length(folder, decoder, tokenizer),
        instruction_template=_template_of(prompts.values()) or EmbeddingSpec.instruction_template,
        prompts=prompts,
    )


def _template_of(prompts: Iterable[str]) -> str | None:
    """The template that stored prompts of E5's form were made by, where they agree on one."""
    found = {match.expand(r"Instruct: {instruction}\1") for p in prompts if (match := re.fullmatch(E5_PROMPT, p, re.DOTALL))}
    return found.pop() if len(found) == 1 else None


def _max_length(folder: Path, decoder: DecoderConfig, tokenizer: Any) -> int:
    """The length texts are cut at: named in sentence_bert_config.json, else the tokenizer's or the model's limit."""
    named = folder / "sentence_bert_config.json"
    limit = min(int(tokenizer.model_max_length), decoder.max_positions)
    return Fields(read_json(named) if named.is_file() else {}, str(named)).whole("max_seq_length", limit)


def _pooling_kind(pooling: Mapping[str, Any], where: Path) -> PoolingKind:
    """Our name of a stock pooling, from the new form of the file ("pooling_mode") or the old one (a flag per kind)."""
    mode = pooling.get("pooling_mode")
    if mode is None:
        chosen = [ours for ours, flag in FLAGS.items() if pooling.get(f"pooling_mode_{flag}")]
    else:
        chosen = [ours for ours, theirs in POOLING_MODES.items() if mode == theirs]
    if len(chosen) != 1:
        told = f"its pooling is not supported; supported: {', '.join(POOLING_MODES.values())}"
        raise UserError(f"{where / 'config.json'}: {told}")
    return chosen[0]


def content_hash(base: Base) -> str:
    """SHA-256 over config and weights of a folder or a run's step, adapters included; of the config alone for a preset."""
    digest = hashlib.sha256(json.dumps(dict(base.hf_config), sort_keys=True).encode())
    if base.run is not None:
        run_dir, step = base.run
        digest.update(read_bytes(run_dir / RECORD))  # it names the base that adapters lie on
        digest.update(params_digest(run_dir, step).encode())
    folders = [folder for folder in (base.folder, *base.adapters) if folder is not None]
    for path in (
        path for folder in folders for path in sorted([*folder.glob("*.safetensors"), *find_part_files(folder).values()])
    ):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
