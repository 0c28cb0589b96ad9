"""Train a byte-level BPE tokenizer for models without a base. It splits identifiers into words."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxembed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
BYTE_TOKENS = 256
# The words of text and of identifiers: `parseHTTPHeader_v2` is parse, HTTP, Header, v, 2. Letters outside ASCII count
# as lower case. The syntax is the common part of Python's `re` and of the tokenizers library's Oniguruma.
WORD_PATTERN = r"[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+"
PRETOKEN_PATTERN = rf" ?(?:{WORD_PATTERN})| ?[^\w\s]+|_+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer. The same texts give the same tokenizer.

    No token crosses the boundary of a word of an identifier. Decoding restores any text exactly. Encoding adds no special
    tokens. EOS is <|endoftext|> and padding is <|pad|>.

    When saved, AutoTokenizer can load it, except next to a config.json of model_type qwen2: transformers 5 then silently
    replaces its pre-tokenizer by Qwen2's own. Another model_type, or PreTrainedTokenizerFast, keeps it.

    Args:
        texts: Texts to train on.
        vocab_size: Maximum number of tokens.

    Raises:
        UserError: `vocab_size` has no room for all bytes and the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < BYTE_TOKENS + 2:
        raise UserError(
            f"vocab_size: {vocab_size} is too small (expected at least {BYTE_TOKENS + 2}, for {BYTE_TOKENS} bytes and 2 "
            "special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )
