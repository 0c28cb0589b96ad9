"""The model card of an exported folder: what it is, how to use it, how it was made and what it scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.model.pooling import TRAINED


@dataclasses.dataclass(frozen=True)
class Card:
    """What the card tells beside the spec. `recipe` is the run's config as YAML, empty for a model that was not trained.

    `merged` tells of a model that was merged out of others, which have no `base` in common to be named.
    """

    name: str
    base: str = ""
    checkpoint: str = ""
    recipe: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    merged: str = ""


def model_card(spec: EmbeddingSpec, card: Card, parity_error: float) -> str:
    """README.md of the folder, with the hub's front matter."""
    projected = f", projected to {spec.projection} numbers" if spec.projection else ""
    trained = f"trained with jaxembed from `{card.base}`{card.checkpoint and f', {card.checkpoint}'}"
    made = "merged with jaxembed out of others" if card.merged else trained
    parts = [
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "tags: [sentence-transformers, feature-extraction, jaxembed]\n---",
        f"# {card.name}",
        f"A text-embedding model {made}: "
        f"{spec.attention} attention, {spec.pooling} pooling{projected}, at most {spec.max_length} tokens a text.",
        _usage(spec),
        _scores(card.scores),
        f"## Merged\n\n{card.merged}" if card.merged else "",
        f"## Recipe\n\n```yaml\n{card.recipe.rstrip()}\n```" if card.recipe else "",
        "## Check\n\n`probe.json` holds texts, their prompts and their vectors. At export the largest difference between "
        f"this folder under sentence-transformers and the model in JAX (float32) was {parity_error:.1e}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapters_card(spec: EmbeddingSpec, base: str) -> str:
    """README.md of a folder of adapters: what reads it, and what a reader of the weights alone would miss."""
    told = [
        f"---\nlibrary_name: peft\nbase_model: {base}\ntags: [jaxembed]\n---",
        f"LoRA adapters of `{base}`, trained with jaxembed, which reads this folder whole: `Embedder.load(folder)`.",
        f"PEFT reads the weights alone. The vectors come of {spec.attention} attention, {spec.pooling} pooling, prompts "
        "and EOS as in `jaxembed.json`; sentence-transformers does not see these: export the model whole for it.",
    ]
    return "\n\n".join(told) + "\n"


def _usage(spec: EmbeddingSpec) -> str:
    query = ', prompt_name="query"' if spec.prompts.get("query") else ""
    document = ', prompt_name="document"' if spec.prompts.get("document") else ""
    own_code = ", trust_remote_code=True" if spec.pooling in TRAINED else ""
    asked = f'["a question" + {spec.query_suffix!r}]' if spec.query_suffix and query else '["a question"]'
    lines = [
        "## Use",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("PATH_OF_THIS_FOLDER"{own_code})',
        f"queries = model.encode({asked}{query})",
        f'documents = model.encode(["a passage"]{document})',
        "print(model.similarity(queries, documents))",
        "```",
        "",
    ]
    if own_code:
        lines += [
            "The pooling has weights of its own; `token_pooling.py` in this folder is its PyTorch module. Where jaxembed is "
            "installed, `jaxembed.hub.load_sentence_transformer(folder)` loads it without that flag.",
            "",
        ]
    if spec.query_suffix:
        lines += [f"Under a prompt, put {spec.query_suffix!r} behind every text yourself: the folder has no place for it.", ""]
    if spec.prompts:
        lines += ["Prompts stored with the model:", ""]
        lines += [f"- `{name}`: {text!r}" for name, text in spec.prompts.items()]
    return "\n".join(lines).rstrip()


def _scores(scores: Mapping[str, float]) -> str:
    if not scores:
        return ""
    rows = [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join(["## Held-out scores", "", "| set/metric | score |", "|---|---|", *rows])
