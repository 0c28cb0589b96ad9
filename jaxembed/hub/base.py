"""The models that training can start from and commands can load: presets, folders, and earlier runs (in `restore.py`)."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

from jaxembed.config.spec import EmbeddingSpec
from jaxembed.data.bpe import train_tokenizer
from jaxembed.files import exists
from jaxembed.formats.tokenizer_config import load_folder_tokenizer
from jaxembed.formats.weight_table import LANGUAGE_MODEL_HEAD
from jaxembed.formats.weights import LowRankUpdate, find_part_files, load_params, open_tensors
from jaxembed.hub.adapters import read_kernel_updates
from jaxembed.model.families import TransformerConfig

log = logging.getLogger("jaxembed")

MAX_TOKENIZER_TEXTS = 200_000  # training texts for a new tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(abc.ABC):
    """A transformer to start from, and how its texts become vectors.

    Attributes:
        name: Name that the user gave.
        hf_config: Hugging Face config of the transformer.
        transformer: The transformer that `hf_config` describes.
        spec: How texts become vectors.
        has_weights: Whether the base has weights. A model without them starts from random parameters.
    """

    name: str
    hf_config: Mapping[str, Any]
    transformer: TransformerConfig
    spec: EmbeddingSpec
    has_weights: ClassVar[bool]

    @abc.abstractmethod
    def hash(self) -> str:
        """Return the SHA-256 of the config and the weights, in hexadecimal digits."""

    @abc.abstractmethod
    def has_untied_head(self) -> bool:
        """Return whether the base has an untied language-model head. A preset has one with random weights."""

    @abc.abstractmethod
    def tokenizer(self, texts: Iterable[str] = ()) -> Any:
        """Return a fast Hugging Face tokenizer.

        Args:
            texts: Training texts. Only a preset reads them, because it has no tokenizer.
        """

    @abc.abstractmethod
    def load(self, shapes: Any, shardings: Any) -> dict[str, Any]:
        """Load the parts of a model (transformer, pooling, projection) for which the base has weights.

        Args:
            shapes: Tree of `jax.ShapeDtypeStruct` of the parts to load. Its dtypes are those of the result.
            shardings: Tree of shardings of the same structure.

        Returns:
            Parameters by part. Parts without weights are absent.

        Raises:
            UserError: The weights do not fit `shapes`, or cannot be read.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetBase(Base):
    """A transformer of a known size with random weights. Its tokenizer is trained on the training texts."""

    has_weights: ClassVar[bool] = False

    def hash(self) -> str:
        """Return the SHA-256 of the config."""
        return start_digest(self.hf_config).hexdigest()

    def has_untied_head(self) -> bool:
        """Return True."""
        return True

    def tokenizer(self, texts: Iterable[str] = ()) -> Any:
        """Train a byte-level BPE tokenizer on the first `MAX_TOKENIZER_TEXTS` texts."""
        log.info("training a tokenizer with %s entries on the training texts", f"{self.transformer.vocab_size:,}")
        return train_tokenizer(islice(texts, MAX_TOKENIZER_TEXTS), self.transformer.vocab_size)

    def load(self, shapes: Any, shardings: Any) -> dict[str, Any]:
        """Return an empty dict: a preset has no weights."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseWithWeights(Base):
    """A base with weights, a tokenizer, and adapters that are merged into the weights: a folder or a run.

    Attributes:
        adapters: PEFT folders whose adapters are added to the weights.
        weights_name: Name of the model under the adapters. It equals `name` if there are none.
    """

    adapters: tuple[Path, ...] = ()
    weights_name: str
    has_weights: ClassVar[bool] = True

    def hash(self) -> str:
        """Return the SHA-256 of the config, the weights and the adapters."""
        digest = start_digest(self.hf_config)
        self._add_weights(digest)
        for folder in self.adapters:
            add_weight_files(digest, folder)
        return digest.hexdigest()

    def tokenizer(self, texts: Iterable[str] = ()) -> Any:
        """Load the tokenizer of the last PEFT folder that has one, otherwise that of the weights."""
        folders = [folder for folder in self.adapters if exists(folder / "tokenizer.json")]
        return load_folder_tokenizer([self._tokenizer_folder, *folders][-1])

    def load(self, shapes: Any, shardings: Any) -> dict[str, Any]:
        """Load the weights, with the adapters added before rounding."""
        updates = read_kernel_updates(self.adapters, self.transformer, shapes)
        return dict(self._load_weights(shapes, shardings, updates))

    def with_adapters(self, name: str, folder: Path, spec: EmbeddingSpec) -> Self:
        """Return this base under another name and spec, with the adapters of one more PEFT folder."""
        return dataclasses.replace(self, name=name, spec=spec, adapters=(*self.adapters, folder))

    @property
    @abc.abstractmethod
    def _tokenizer_folder(self) -> Path: ...

    @abc.abstractmethod
    def _add_weights(self, digest: Any) -> None:
        """Update a digest with everything that identifies the weights."""

    @abc.abstractmethod
    def _load_weights(self, shapes: Any, shardings: Any, updates: Mapping[str, LowRankUpdate]) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderBase(BaseWithWeights):
    """A Hugging Face or sentence-transformers folder.

    Attributes:
        folder: Folder with config.json, the tokenizer and the weights.
    """

    folder: Path

    def has_untied_head(self) -> bool:
        """Return whether the weight files hold the head."""
        with open_tensors(self.folder) as tensors:
            return LANGUAGE_MODEL_HEAD.tensor_name in tensors

    @property
    def _tokenizer_folder(self) -> Path:
        return self.folder

    def _add_weights(self, digest: Any) -> None:
        add_weight_files(digest, self.folder)

    def _load_weights(self, shapes: Any, shardings: Any, updates: Mapping[str, LowRankUpdate]) -> Mapping[str, Any]:
        return dict(load_params(self.folder, self.transformer, shapes, shardings, updates))


def start_digest(hf_config: Mapping[str, Any]) -> Any:
    """Start a SHA-256 digest with a config."""
    return hashlib.sha256(json.dumps(dict(hf_config), sort_keys=True).encode())


def add_weight_files(digest: Any, folder: Path) -> None:
    """Add the SHA-256 of each weight file of a folder to a digest."""
    for path in sorted([*folder.glob("*.safetensors"), *find_part_files(folder).values()]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
