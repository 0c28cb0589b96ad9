"""The model card of an exported folder: what the model is, how to use it, how it was trained, and its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxembed.config import CausalLMConfig, read_run_config
from jaxembed.config.fields import Fields
from jaxembed.config.local_paths import shorten_path, shorten_paths_in_yaml
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.files import read_json, read_text
from jaxembed.formats.run_files import BASE_RECORD_FILE
from jaxembed.hub.onnx_export import INT8_GRAPH_FILE, OnnxReport
from jaxembed.hub.reader_rules import ServedModel
from jaxembed.hub.readers import FOLDER_NAME, format_reader_table
from jaxembed.hub.safe_dtypes import DtypeQuality
from jaxembed.model.families import FAMILIES
from jaxembed.model.pooling import TRAINABLE_POOLINGS
from jaxembed.training.metrics import read_metrics

QUESTION = "What is a text embedding?"  # of the example that generates text


@dataclasses.dataclass(frozen=True)
class Card:
    """The content of a model card besides the spec.

    Attributes:
        name: Title.
        base: Name of the base; for a model that was not trained, the first digits of the hash of its weights.
        checkpoint: The exported checkpoint of the run.
        recipe: Config of the run in YAML; empty for a model that was not trained.
        scores: Held-out scores by SET/METRIC.
        merging: How the model was merged from others, in Markdown; empty if it was not.
        prompt: A question in the model's template, if the model was trained to generate answers; otherwise empty.
    """

    name: str
    base: str = ""
    checkpoint: str = ""
    recipe: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    merging: str = ""
    prompt: str = ""


def read_card(model: Path, revision: str, adapter: str | None = None) -> Card:
    """Return the model card of a run: its base, its recipe, and the scores of the exported checkpoint.

    Args:
        model: Run directory. For other models the card has only a name and a base.
        revision: Revision of the loaded model, which contains the step of its checkpoint.
        adapter: Name of the exported adapter. The card then has the scores of the sets that are scored under it.
    """
    record_path, config_path = model / BASE_RECORD_FILE, model / "config.yaml"
    if not record_path.is_file():
        return Card(name=model.resolve().name, base=revision)
    step = int(revision.removeprefix(f"{model.resolve().name}-").split("-")[0])
    rows = [row for row in read_metrics(model) if row["step"] == step]
    scores = {k.removeprefix("eval/"): v for row in rows for k, v in row.items() if k.startswith("eval/") and v is not None}
    checkpoint = f"step {step}"
    if adapter is not None:
        checkpoint += f", adapter {adapter}"
        other_sets = {s.name for s in read_run_config(config_path).eval.sets if s.adapter != adapter}
        scores = {name: score for name, score in scores.items() if name.rpartition("/")[0] not in other_sets}
    base = shorten_path(Fields(read_json(record_path), str(record_path)).string("name"))
    recipe = shorten_paths_in_yaml(read_text(config_path))
    generative = [o for stage in read_run_config(config_path).stages for o in stage.objectives if isinstance(o, CausalLMConfig)]
    prompt = generative[-1].write_prompt(QUESTION) if generative else ""
    return Card(name=model.resolve().name, base=base, checkpoint=checkpoint, recipe=recipe, scores=scores, prompt=prompt)


def format_model_card(model: ServedModel, card: Card, parity_error: float, precision: str) -> str:
    """Return the README.md of an exported folder, with the hub's front matter.

    Args:
        model: The properties that determine how the folder is used.
        card: Further content.
        parity_error: Largest difference of a component between the exported vectors and the model's.
        precision: The section from `format_precision`.
    """
    spec = model.spec
    projection = f", projected to {spec.projection} dimensions" if spec.projection else ""
    checkpoint = f", {card.checkpoint}" if card.checkpoint else ""
    if card.merging:
        origin = "merged with jaxembed from other models"
    elif card.recipe:
        origin = f"trained with jaxembed from `{card.base}`{checkpoint}"
    else:
        origin = f"exported with jaxembed (weights `{card.base}`)"
    parts = [
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags: [sentence-transformers, feature-extraction, jaxembed]\n---",
        f"# {card.name}",
        f"A text-embedding model {origin}: "
        f"{spec.attention} attention, {spec.pooling} pooling{projection}, up to {spec.max_length} tokens per text.",
        _format_usage(spec),
        _format_generation(model, card.prompt) if card.prompt else "",
        f"## Programs\n\n{format_reader_table(model)}",
        precision,
        _format_check(spec, parity_error),
        _format_scores(card.scores),
        f"## Merged models\n\n{card.merging}" if card.merging else "",
        f"## Recipe\n\n```yaml\n{card.recipe.rstrip()}\n```" if card.recipe else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_precision(dtypes: Iterable[DtypeQuality], onnx: OnnxReport | None) -> str:
    """Return the section of the model card about dtypes: which ones are safe, and the loss of an int8 graph."""
    rows = [f"| {quality.dtype} | {'yes' if quality.is_safe else '**no**'} | {quality.finding} |" for quality in dtypes]
    lines = [
        "## Dtypes",
        "",
        "Cosines with the float32 vectors of the same texts, prose and code. The ONNX graph computes in float32.",
        "",
        "| dtype | safe | measured |",
        "|---|---|---|",
        "| float32 | yes | |",
        *rows,
    ]
    if onnx and (int8 := onnx.int8):
        lines += [
            "",
            f"`onnx/{INT8_GRAPH_FILE}` has int8 weights: cosine at least {int8.least_cosine:.4f}, mean {int8.mean_cosine:.4f}. "
            f"For {int8.ranking_agreement:.1%} of all triples of texts, it agrees which of two texts is closer to the third.",
        ]
    return "\n".join(lines)


def format_adapter_card(spec: EmbeddingSpec, base: str) -> str:
    """Return the README.md of a folder of adapters: how to load it, and what PEFT does not read."""
    base = shorten_path(base)
    parts = [
        f"---\nlibrary_name: peft\nbase_model: {base}\ntags: [jaxembed]\n---",
        f"LoRA adapters of `{base}`, trained with jaxembed. `jaxembed.Embedder.load(folder)` loads the complete model.",
        f"PEFT reads only the weights. The vectors also need {spec.attention} attention, {spec.pooling} pooling, and the "
        "prompts and EOS in `jaxembed.json`. sentence-transformers does not read that file: export the whole model for it.",
    ]
    return "\n\n".join(parts) + "\n"


def _format_usage(spec: EmbeddingSpec) -> str:
    query = ', prompt_name="query"' if spec.prompts.get("query") else ""
    document = ', prompt_name="document"' if spec.prompts.get("document") else ""
    has_own_code = spec.pooling in TRAINABLE_POOLINGS
    trust = ", trust_remote_code=True" if has_own_code else ""
    question = f'["a question" + {spec.query_suffix!r}]' if spec.query_suffix and query else '["a question"]'
    lines = [
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{FOLDER_NAME}"{trust})',
        f"queries = model.encode({question}{query})",
        f'documents = model.encode(["a passage"]{document})',
        "print(model.similarity(queries, documents))",
        "```",
        "",
    ]
    if has_own_code:
        lines += [
            "The pooling has its own weights. `token_pooling.py` in this folder is its PyTorch module. If jaxembed is "
            "installed, `jaxembed.hub.load_sentence_transformer(folder)` loads the folder without `trust_remote_code`.",
            "",
        ]
    if spec.query_suffix:
        lines += [f"Append {spec.query_suffix!r} to every text that has a prompt: the folder cannot store this.", ""]
    if spec.matryoshka_dims:
        widths = ", ".join(map(str, sorted(spec.matryoshka_dims)))
        lines += [
            f"Vectors may be truncated to {widths} dimensions. sentence-transformers truncates after the normalization, so "
            f"both options are needed: `model.encode(texts, truncate_dim={min(spec.matryoshka_dims)}, "
            "normalize_embeddings=True)`.",
            "",
        ]
    if spec.exit_layers:
        exits = ", ".join(map(str, spec.exit_layers))
        lines += [
            f"The model was also trained with only its first {exits} layers. `jaxembed export MODEL OUT --layers N` "
            "truncates it.",
            "",
        ]
    if spec.prompts:
        lines += ["Prompts stored with the model:", ""]
        lines += [f"- `{name}`: {text!r}" for name, text in spec.prompts.items()]
    return "\n".join(lines).rstrip()


def _format_generation(model: ServedModel, prompt: str) -> str:
    """Return the section about generating text. The folder's mask is that of vectors, so another one is asked for."""
    transformer, causal = model.transformer, ""
    if model.spec.attention != "causal":
        field = FAMILIES[transformer.family].mask_field
        causal = f", {field}={field == 'is_causal'}"
        if transformer.halves_windows:  # transformers has halved the window when it sees the argument
            causal += "".join(f", sliding_window={window}" for window in sorted({w for w in transformer.windows if w}))
    lines = [
        "## Generate",
        "",
        "The folder also is a causal language model, which was trained to answer. Its weights are those of the embedder.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER_NAME}")',
        f'model = AutoModelForCausalLM.from_pretrained("{FOLDER_NAME}"{causal})',
        f"prompt = {prompt!r}",
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
        "```",
    ]
    if causal:
        lines += ["", f"Without{causal.removeprefix(',')}, every token would see the tokens after it, as for vectors."]
    return "\n".join(lines)


def _format_check(spec: EmbeddingSpec, parity_error: float) -> str:
    """Return the section that shows how to compare a program with the model. A prompt's suffix is part of the text."""
    text = f'p["text"] + {spec.query_suffix!r} * bool(p["prompt"])' if spec.query_suffix else 'p["text"]'
    lines = [
        "## Check",
        "",
        "`probe.json` contains texts, their prompts and their vectors. This prints the lowest cosine: 1.0 in float32 if a "
        "program computes the same vectors. `jaxembed verify` checks a running server.",
        "",
        "```python",
        "import json",
        f'probes = json.load(open("{FOLDER_NAME}/probe.json"))',
        f'print(min(model.encode({text}, prompt=p["prompt"], normalize_embeddings=True) @ p["vector"] for p in probes))',
        "```",
        "",
        "At export, the largest difference between this folder under sentence-transformers and the model in JAX (float32) was "
        f"{parity_error:.1e}.",
    ]
    return "\n".join(lines)


def _format_scores(scores: Mapping[str, float]) -> str:
    if not scores:
        return ""
    rows = [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join(["## Held-out scores", "", "| set/metric | score |", "|---|---|", *rows])
