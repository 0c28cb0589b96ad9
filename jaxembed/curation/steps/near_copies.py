"""The step `duplicates`, near: drops texts that share most character n-grams (MinHash, locality-sensitive hashing).

Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. rensa computes the signatures.

1. A text becomes the set of its character n-grams. Unlike words, they need no segmenter for code, Chinese or Thai.
2. Its signature has `NUM_HASHES` values. The share of equal values in two signatures estimates the Jaccard index.
3. Signatures are cut into bands. Texts with an equal band share a bucket, and are compared with the first text in it.
4. Texts whose estimate reaches the threshold are connected. One text of each connected component is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxembed.config.curation import DuplicatesStepConfig
from jaxembed.curation.ngrams import HASH_FACTOR, UNSPACED_CHARS, hash_runs
from jaxembed.curation.steps.curated_row import CuratedRow
from jaxembed.curation.steps.items import list_items
from jaxembed.curation.steps.record_files import RecordFiles
from jaxembed.data.equality import normalize_text
from jaxembed.errors import UserError

NUM_HASHES = 128  # the standard deviation of the estimate is at most 0.044
HASH_SEED = 1
NGRAM_CHARS, UNSPACED_NGRAM_CHARS = 5, 3
MIN_RECALL = 0.99  # of pairs whose Jaccard index equals the threshold; determines the width of a band
PAIRS_PER_READ = 4096

# Hangul too: a syllable carries more information than a letter.
UNSPACED_CHAR = re.compile(f"[{UNSPACED_CHARS}\uac00-\ud7af]")
BAND_RECORD = np.dtype([("key", "<u8"), ("content", "<u8"), ("item", "<u8")])
SIGNATURE_RECORD = np.dtype([("hashes", "<u2", NUM_HASHES)])  # the low 16 bits, which suffice to compare two signatures
RANK_RECORD = np.dtype([("rank", "<u8"), ("content", "<u8")])


class NearCopies:
    """Keeps one item of each connected component of texts with a Jaccard index of at least the threshold.

    Which copy is kept depends on its rank and content, not on the order of rows.
    """

    def __init__(self, config: DuplicatesStepConfig, folder: Path, max_rows: int, memory_mb: int):
        """Start without rows. See `RecordFiles` for `folder` and `memory_mb`."""
        self._minhash = import_rensa()
        self._config = config
        self._band_hashes = choose_band_hashes(config.min_similarity)
        num_bands = NUM_HASHES // self._band_hashes
        self._bands = RecordFiles(folder, BAND_RECORD, max_rows * num_bands, memory_mb)
        self._signatures, self._ranks = (folder / "signatures").open("w+b"), (folder / "ranks").open("w+b")
        self._num_items = 0

    def close(self) -> None:
        """Close the files."""
        self._bands.close()
        self._signatures.close()
        self._ranks.close()

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the items of rows: their bands, signatures and ranks."""
        pairs = [(row.source, item) for row in rows for item in list_items(row, self._config)]
        if not pairs:
            return
        signatures = compute_signatures([item.text for _, item in pairs], self._minhash)
        content = np.array([item.content for _, item in pairs], np.uint64)
        numbers = np.arange(self._num_items, self._num_items + len(pairs), dtype=np.uint64)
        groups = np.array([0 if self._config.across_sources else source for source, _ in pairs], np.uint64)
        for band, key in enumerate(hash_bands(signatures, self._band_hashes)):
            records = np.empty(len(pairs), BAND_RECORD)
            records["key"] = mix(key ^ mix(groups + np.uint64(band << 32)))
            records["content"], records["item"] = content, numbers
            self._bands.append(records)
        ranks = np.empty(len(pairs), RANK_RECORD)
        ranks["rank"], ranks["content"] = [item.rank for _, item in pairs], content
        self._ranks.write(ranks.tobytes())
        self._signatures.write(signatures.astype(np.uint16).tobytes())
        self._num_items += len(pairs)

    def find_dropped(self) -> np.ndarray:
        """Return whether each item is dropped, bool [I]."""
        dropped = np.zeros(self._num_items, bool)
        if not self._num_items:
            return dropped
        edges = self._find_edges()
        if not len(edges):
            return dropped
        nodes, ends = np.unique(edges, return_inverse=True)
        ends = ends.reshape(edges.shape)
        graph = coo_array((np.ones(len(edges), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
        _, components = connected_components(graph, directed=False)
        ranks = read_records(self._ranks, RANK_RECORD, nodes)
        order = np.lexsort((nodes, ranks["content"], ~ranks["rank"], components))
        is_copy = components[order][1:] == components[order][:-1]
        dropped[nodes[order[1:]][is_copy]] = True
        return dropped

    def _find_edges(self) -> np.ndarray:
        """Return the pairs of items that reach the threshold, int64 [E, 2]: the first item of a bucket, and another one."""
        edges = np.zeros((0, 2), np.int64)
        for records in self._bands.partitions():
            order = np.lexsort((records["item"], records["content"], records["key"]))
            keys, items = records["key"][order], records["item"][order].astype(np.int64)
            starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
            sizes = np.diff(np.append(starts, len(keys)))
            pairs = np.stack([np.repeat(items[starts], sizes), items], 1)
            pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
            parts = np.split(pairs, range(PAIRS_PER_READ, len(pairs), PAIRS_PER_READ))
            similar = [part[self._compare(part) >= self._config.min_similarity] for part in parts]
            edges = np.unique(np.concatenate([edges, *similar]), axis=0)
        return edges

    def _compare(self, pairs: np.ndarray) -> np.ndarray:
        """Return the estimated Jaccard index of pairs of items, float64 [P]."""
        first, second = (read_records(self._signatures, SIGNATURE_RECORD, items)["hashes"] for items in pairs.T)
        return np.asarray((first == second).mean(1))


def read_records(file: IO[bytes], dtype: np.dtype, indices: np.ndarray) -> np.ndarray:
    """Return the records of a file at some indices. A memory map would count as memory of the process."""
    file.flush()
    size, descriptor = dtype.itemsize, file.fileno()
    return np.frombuffer(b"".join(os.pread(descriptor, size, size * index) for index in indices.tolist()), dtype)


def import_rensa() -> Any:
    """Return rensa's MinHash."""
    try:
        import rensa
    except ImportError:
        raise UserError("duplicates: near copies need rensa, which is not installed. Run pip install '.[curate]'.") from None
    return rensa.RMinHash


def choose_band_hashes(threshold: float) -> int:
    """Return the widest band with which a pair at the threshold shares a bucket with a probability of at least `MIN_RECALL`."""
    widths = range(1, NUM_HASHES + 1)
    return max(width for width in widths if 1 - (1 - threshold**width) ** (NUM_HASHES // width) >= MIN_RECALL)


def compute_signatures(texts: Sequence[str], minhash: Any) -> np.ndarray:
    """Return the MinHash signatures of texts, uint32 [N, NUM_HASHES]."""
    hashes = [hash_ngrams(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in hashes])]).astype(np.uint64)
    matrix = minhash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), offsets, num_perm=NUM_HASHES, seed=HASH_SEED)
    return np.array(matrix.to_rows(), np.uint32)


def hash_ngrams(text: str) -> np.ndarray:
    """Return hashes of the character n-grams of a text, uint64 [N]. They are shorter if most of it has no spaces."""
    normalized = normalize_text(text)
    is_unspaced = 2 * len(UNSPACED_CHAR.findall(normalized)) > len(normalized)
    size = UNSPACED_NGRAM_CHARS if is_unspaced else NGRAM_CHARS
    chars = np.frombuffer(normalized.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return mix(hash_runs(chars, min(size, len(chars))))


def hash_bands(signatures: np.ndarray, width: int) -> list[np.ndarray]:
    """Return a hash of each band of the signatures, uint64 [N] each."""
    hashes = []
    for start in range(0, NUM_HASHES - width + 1, width):
        key = np.zeros(len(signatures), np.uint64)
        for column in signatures[:, start : start + width].T:
            key = mix(key ^ column.astype(np.uint64))
        hashes.append(key)
    return hashes


def mix(values: np.ndarray) -> np.ndarray:
    """Return well-distributed 64-bit hashes of 64-bit values (SplitMix64; Steele, Lea and Flood 2014)."""
    values = (values + HASH_FACTOR) & np.uint64(0xFFFFFFFFFFFFFFFF)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
