"""Read exports with transformers' AutoModel, and pool explicitly by 1_Pooling/config.json."""

import json
from pathlib import Path

import torch
from row_files import Row, encode_by_prompt, has_code
from transformers import AutoModel, AutoTokenizer


def pool(hidden: torch.Tensor, mask: torch.Tensor, config: dict[str, bool]) -> torch.Tensor:
    """Return vectors [B, D] of hidden states [B, T, D].

    Args:
        hidden: The hidden states.
        mask: True at the tokens to pool, [B, T].
        config: Content of 1_Pooling/config.json, which has a flag for every mode.
    """
    if config["pooling_mode_cls_token"]:
        return hidden[torch.arange(len(hidden)), mask.int().argmax(1)]
    if config["pooling_mode_lasttoken"]:
        return hidden[torch.arange(len(hidden)), mask.shape[1] - 1 - mask.flip(1).int().argmax(1)]
    if config["pooling_mode_max_tokens"]:
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    weights = mask[..., None].to(hidden.dtype)
    if config["pooling_mode_weightedmean_tokens"]:
        weights = weights * torch.arange(1, mask.shape[1] + 1)[None, :, None]
    return (hidden * weights).sum(1) / weights.sum(1)


def read_pooling_config(folder: str) -> dict[str, bool]:
    """Return the content of 1_Pooling/config.json."""
    return json.loads((Path(folder) / "1_Pooling" / "config.json").read_text())


def encode_with_auto_model(folder: str, rows: list[Row]) -> list[torch.Tensor]:
    """Return the unit vector of every row.

    Raises:
        ValueError: The folder has weights that AutoModel does not load.
    """
    if has_code(folder):
        raise ValueError("the pooling has weights, which AutoModel does not load")
    if list(Path(folder).glob("*_Dense")):
        raise ValueError("the projection is a module of sentence-transformers, which AutoModel does not load")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    config = read_pooling_config(folder)

    def encode_texts(texts: list[str], prompt: str) -> torch.Tensor:
        inputs = tokenizer([prompt + text for text in texts], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        if prompt and not config.get("include_prompt", True):
            # As in sentence-transformers, the prompt's token count is that of the prompt alone, without EOS.
            count = len(tokenizer(prompt)["input_ids"])
            count -= tokenizer(prompt)["input_ids"][-1] in tokenizer.all_special_ids
            mask &= torch.arange(mask.shape[1])[None] >= count
        return torch.nn.functional.normalize(pool(hidden, mask, config).float(), dim=1)

    return encode_by_prompt(rows, encode_texts)
