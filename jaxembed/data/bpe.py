"""A byte-level BPE tokenizer for models trained from scratch, which sees the words inside identifiers."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxembed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256
# The words of text and of identifiers: `parseHTTPHeader_v2` is parse, HTTP, Header, v, 2. Letters outside ASCII count
# as lower case. The syntax is the common part of Python's `re` and of the tokenizers library's Oniguruma.
WORD = r"[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+"
PIECE = rf" ?(?:{WORD})| ?[^\w\s]+|_+|\s+(?!\S)|\s+"


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, identifiers split at underscores, case changes and digits."""
    return [word.lower() for word in re.findall(WORD, text)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Returns a byte-level BPE tokenizer with at most `vocab_size` tokens, the same for the same texts.

    No token crosses the border of a word of an identifier. Decoding gives back any text exactly. No token is added to
    a text by itself; eos is <|endoftext|> and pad is <|pad|>.

    Saved, it loads by AutoTokenizer, but not beside a config.json of model_type qwen2: transformers 5 then silently
    puts Qwen2's own splitting in place of this one. Another model_type, or PreTrainedTokenizerFast, keeps it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < BYTES + 2:
        raise UserError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs {BYTES} bytes and 2 special tokens")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECE), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False)
