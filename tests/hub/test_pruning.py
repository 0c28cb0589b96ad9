"""Pruning: layers, feed-forward units and vocabularies, as folders that stock programs load; bad input."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers import tiny
from jaxembed import Embedder, prune
from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.vocabulary import shrink_vocabulary
from jaxembed.errors import UserError
from jaxembed.hub.pruning import measure_activity, prune_layers, prune_mlp, prune_vocabulary, spread_layers
from jaxembed.hub.spec_files import write_spec

TEXTS = ["The man plays a guitar.", "def f(x): return x + 1", "naïve café", "indices of the maximum"]
UNSEEN = ["quick brown foxes 9", "数学 🙂"]


def load(root: Path, family: str) -> Embedder:
    tiny.write_folder(root / family, family)
    return Embedder.load(root / family)


def test_layers_are_those_that_are_kept(tmp_path: Path) -> None:
    embedder = load(tmp_path, "qwen2-mixed")
    pruned = prune_layers(embedder, [2, 0])
    assert (pruned.model.transformer.layers, pruned.model.transformer.windows) == (2, (4, None))
    assert pruned.hf_config["layer_types"] == ["sliding_attention", "full_attention"]
    np.testing.assert_allclose(
        prune_layers(embedder, [0, 1]).encode(TEXTS), embedder.keep_first_layers(2).encode(TEXTS), atol=1e-6
    )
    # A layer that adds nothing can be left out.
    layers = jax.tree.map(lambda x: x, embedder.params["decoder"]["layers"])
    for part in (layers["attention"]["out"], layers["mlp"]["down"]):
        part["kernel"] = part["kernel"].at[1].set(0)
    silent = embedder.with_params({**embedder.params, "decoder": {**embedder.params["decoder"], "layers": layers}})
    np.testing.assert_allclose(prune_layers(silent, [0, 2]).encode(TEXTS), silent.encode(TEXTS), atol=1e-6)
    assert (spread_layers(12, 4), spread_layers(3, 3), spread_layers(5, 1)) == ([0, 4, 7, 11], [0, 1, 2], [4])


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_units_without_effect_are_dropped_first(tmp_path: Path, family: str) -> None:
    """Gated, and with biases. By weights and by activations: units that add nothing, or are never active on the texts."""
    embedder = load(tmp_path, family)
    layers = embedder.params["decoder"]["layers"]
    mlp, silent = dict(layers["mlp"]), jnp.array([[1, 5], [0, 2], [7, 40]])
    rows = jnp.arange(3)[:, None]
    mlp["down"] = {**mlp["down"], "kernel": mlp["down"]["kernel"].at[rows, silent].set(0)}
    params = {**embedder.params, "decoder": {**embedder.params["decoder"], "layers": {**layers, "mlp": mlp}}}
    changed = embedder.with_params(params)
    pruned = prune_mlp(changed, 46, None)
    assert (pruned.model.transformer.mlp_width, pruned.hf_config["intermediate_size"]) == (46, 46)
    np.testing.assert_allclose(pruned.encode(TEXTS), changed.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(prune_mlp(changed, 46, TEXTS).encode(TEXTS), changed.encode(TEXTS), atol=1e-6)


def test_activity_is_measured_on_the_tokens_of_the_texts(tmp_path: Path) -> None:
    """Against transformers, text by text: padding does not count."""
    embedder = load(tmp_path, "bert")
    model = transformers.AutoModel.from_pretrained(tmp_path / "bert")
    squares, tokens = np.zeros((3, 48)), 0
    for layer, block in enumerate(model.encoder.layer):

        def add(_: Any, __: Any, output: Any, layer: int = layer) -> None:
            squares[layer] += output.detach().numpy()[0].astype(np.float64).__pow__(2).sum(axis=0)

        block.intermediate.register_forward_hook(add)
    for ids in embedder.tokenizer(TEXTS, [""] * len(TEXTS)).ids:
        model(transformers.BatchEncoding({"input_ids": [list(map(int, ids))]}, tensor_type="pt")["input_ids"])
        tokens += len(ids)
    np.testing.assert_allclose(measure_activity(embedder, iter(TEXTS)), np.sqrt(squares / tokens), rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "bert", "xlm-roberta"])
def test_a_smaller_vocabulary_keeps_the_vectors_of_its_texts(tmp_path: Path, family: str) -> None:
    embedder = load(tmp_path, family)
    pruned = prune_vocabulary(embedder, iter(TEXTS))
    rows = pruned.params["decoder"]["embedding"].shape[0]
    assert rows == pruned.model.transformer.vocab_size == pruned.hf_config["vocab_size"] == len(pruned.tokenizer.hf_tokenizer)
    assert rows < len(embedder.tokenizer.hf_tokenizer) or family == "bert"  # all tokens of this one are single characters
    np.testing.assert_allclose(pruned.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)
    assert np.isfinite(pruned.encode(UNSEEN)).all()
    for role in ("bos_token", "eos_token", "pad_token", "cls_token"):
        assert getattr(pruned.tokenizer.hf_tokenizer, role) == getattr(embedder.tokenizer.hf_tokenizer, role)


def test_a_unigram_vocabulary_shrinks(tmp_path: Path) -> None:
    """XLM-RoBERTa's kind: pieces with scores, the unknown piece by its id, and special tokens in the post-processor."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        tiny.TEXTS * 9, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    state = json.loads(backend.to_str())
    texts = ["The man is playing.", "the evening comes @"]
    used = {id_ for text in texts for id_ in backend.encode(text).ids}
    smaller, old_ids = shrink_vocabulary(state, used)
    rebuilt = Tokenizer.from_str(json.dumps(smaller))
    assert used <= set(old_ids) and len(old_ids) == rebuilt.get_vocab_size() < backend.get_vocab_size()
    for text in texts:
        assert rebuilt.encode(text).tokens == backend.encode(text).tokens
        assert [old_ids[i] for i in rebuilt.encode(text).ids] == backend.encode(text).ids


def test_the_command_writes_a_folder_and_reports_sizes(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path / "base", "qwen3")
    write_spec(tmp_path / "base", EmbeddingSpec(pooling="mean", max_length=64, prompts={"query": "Find: "}))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    result = run(
        tmp_path / "base", tmp_path / "out", "--layer-count", "2", "--mlp-width", "40", "--activations-from",
        tmp_path / "texts.txt", "--vocabulary-from", open_pipe(),
    )  # fmt: skip
    pruned = Embedder.load(tmp_path / "out")
    transformer = pruned.model.transformer
    assert (transformer.layers, transformer.mlp_width) == (2, 40)
    assert [result["before"][key] for key in ("layers", "mlp_width", "vocab_size")] == [3, 48, 300]
    assert [result["after"][key] for key in ("layers", "mlp_width", "vocab_size")] == [2, 40, transformer.vocab_size]
    assert result["after"]["parameters"] < result["before"]["parameters"]
    assert np.isfinite(pruned.encode(TEXTS, prompt_name="query")).all()


def open_pipe() -> str:
    """Return the path of a pipe that holds the texts."""
    reader, writer = os.pipe()
    os.write(writer, "\n".join(TEXTS).encode())
    os.close(writer)
    return f"/dev/fd/{reader}"


def run(*arguments: Any) -> dict[str, Any]:
    return prune.main(prune.make_parser().parse_args(list(map(str, arguments))))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    embedder = load(tmp_path, "qwen2")
    with pytest.raises(UserError, match=r"--keep-layers: \[3\] is out of range \(this model has 3, counted from 0\)"):
        prune_layers(embedder, [3])
    with pytest.raises(UserError, match=r"--layer-count: 4 is out of range \(this model has 3 layers\)\. Choose 1 to 3\."):
        spread_layers(3, 4)
    with pytest.raises(UserError, match=r"--mlp-width: 49 is out of range .* Choose 1 to 48\."):
        prune_mlp(embedder, 49, None)
    with pytest.raises(UserError, match=r"cannot shrink a tokenizer of this kind \(found WordLevel; expected BPE or U"):
        shrink_vocabulary({"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []}, [])
    modern = load(tmp_path, "modernbert")
    with pytest.raises(UserError, match=r"the first layer of modernbert has no norm before it\. Keep layer 0\."):
        prune_layers(modern, [1, 2])
    without_types = {key: value for key, value in modern.hf_config.items() if key != "layer_types"}
    with pytest.raises(UserError, match=r"the config of modernbert cannot describe the pruned model"):
        prune_layers(dataclasses.replace(modern, hf_config=without_types), [0, 2])
    base, out = tmp_path / "qwen2", tmp_path / "out"
    with pytest.raises(UserError, match=r"^prune: nothing to prune\. Give --layer-count"):
        run(base, out)
    with pytest.raises(UserError, match=r"^--activations-from: chooses the units of --mlp-width\. Add it\."):
        run(base, out, "--layer-count", 2, "--activations-from", tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt"):
        run(base, out, "--vocabulary-from", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match=r"a\.txt: has no texts\.$"):
        run(base, out, "--vocabulary-from", tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: has no texts\.$"):
        list(prune.read_all([str(tmp_path / "a.txt")], "text"))
    assert not out.exists()
