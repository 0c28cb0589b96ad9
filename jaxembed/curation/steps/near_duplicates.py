"""The step `duplicates`, near: drops texts that share most character n-grams (`curation.minhash`).

1. A text becomes the set of its character n-grams. Unlike words, they need no segmenter for code, Chinese or Thai.
2. Texts that share a bucket are compared with the first text in it.
3. Texts whose estimated Jaccard index reaches the threshold are connected. One text of each connected component is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxembed.config.curation import DuplicatesStepConfig
from jaxembed.curation.minhash import NUM_HASHES, choose_hashes_per_band, compute_signatures, hash_bands, import_rensa
from jaxembed.curation.ngrams import UNSPACED_CHARS, hash_runs, mix_bits
from jaxembed.curation.steps.curated_row import CuratedRow
from jaxembed.curation.steps.items import list_items
from jaxembed.curation.steps.record_files import RecordFiles
from jaxembed.data.equality import normalize_text

NGRAM_CHARS, UNSPACED_NGRAM_CHARS = 5, 3
ITEMS_PER_READ = 4096
PAIR_BITS = np.uint64(32)  # so that a pair of items fits into 64 bits

# Hangul too: a syllable carries more information than a letter.
UNSPACED_CHAR = re.compile(f"[{UNSPACED_CHARS}\uac00-\ud7af]")
BAND_RECORD = np.dtype([("key", "<u8"), ("row_hash", "<u8"), ("item", "<u8")])
SIGNATURE_RECORD = np.dtype([("hashes", "<u2", NUM_HASHES)])  # the low 16 bits, which suffice to compare two signatures
PRIORITY_RECORD = np.dtype([("priority", "<u8"), ("row_hash", "<u8")])


class NearDuplicatesStep:
    """Keeps one item of each connected component of texts with a Jaccard index of at least the threshold.

    Which copy is kept depends on its priority and the hash of its row, not on the order of rows.
    """

    def __init__(self, config: DuplicatesStepConfig, folder: Path, max_rows: int, memory_mb: int):
        """Start without rows. See `RecordFiles` for `folder` and `memory_mb`."""
        self._minhash = import_rensa()
        self._config = config
        self._hashes_per_band = choose_hashes_per_band(config.min_similarity)
        num_bands = NUM_HASHES // self._hashes_per_band
        self._bands = RecordFiles(folder, BAND_RECORD, max_rows * num_bands, memory_mb)
        self._signatures, self._priorities = (folder / "signatures").open("w+b"), (folder / "priorities").open("w+b")
        self._num_items = 0

    def close(self) -> None:
        """Close the files."""
        self._bands.close()
        self._signatures.close()
        self._priorities.close()

    def collect(self, rows: Sequence[CuratedRow]) -> None:
        """Record the items of rows: their bands, signatures and priorities."""
        pairs = [(row.source, item) for row in rows for item in list_items(row, self._config)]
        if not pairs:
            return
        signatures = compute_signatures(hash_char_ngrams([item.text for _, item in pairs]), self._minhash)
        row_hashes = np.array([item.row_hash for _, item in pairs], np.uint64)
        item_numbers = np.arange(self._num_items, self._num_items + len(pairs), dtype=np.uint64)
        groups = np.array([0 if self._config.across_sources else source for source, _ in pairs], np.uint64)
        for buckets in hash_bands(signatures, self._hashes_per_band):
            records = np.empty(len(pairs), BAND_RECORD)
            records["key"] = mix_bits(buckets ^ mix_bits(groups))
            records["row_hash"], records["item"] = row_hashes, item_numbers
            self._bands.append(records)
        priorities = np.empty(len(pairs), PRIORITY_RECORD)
        priorities["priority"], priorities["row_hash"] = [item.priority for _, item in pairs], row_hashes
        self._priorities.write(priorities.tobytes())
        self._signatures.write(signatures.astype(np.uint16).tobytes())
        self._num_items += len(pairs)

    def find_dropped(self) -> np.ndarray:
        """Return whether each item is dropped, bool [I]."""
        dropped = np.zeros(self._num_items, bool)
        if not self._num_items:
            return dropped
        first, second = split_pairs(self._find_edges())
        if not len(first):
            return dropped
        # Connect similar texts. Nodes are numbered from 0, because most items have no edge.
        nodes = sort_unique(np.concatenate([first, second]))
        ends = tuple(np.searchsorted(nodes, items).astype(np.int32) for items in (first, second))
        graph = coo_array((np.ones(len(first), bool), ends), shape=(len(nodes), len(nodes)))
        _, components = connected_components(graph, directed=False)
        # Choose the items to keep in some components at a time.
        by_component = np.argsort(components, kind="stable")
        starts = 1 + np.flatnonzero(np.diff(components[by_component]))
        for part in np.split(by_component, starts[ITEMS_PER_READ::ITEMS_PER_READ]):
            dropped[self._list_copies(nodes[part], components[part])] = True
        return dropped

    def _list_copies(self, items: np.ndarray, components: np.ndarray) -> np.ndarray:
        """Return the items that are not the first of their component by priority, then hash of the row."""
        records = read_records(self._priorities, PRIORITY_RECORD, items)
        order = np.lexsort((items, records["row_hash"], ~records["priority"], components))
        is_copy = components[order][1:] == components[order][:-1]
        return items[order[1:]][is_copy]

    def _find_edges(self) -> np.ndarray:
        """Return the pairs (`join_pairs`) that reach the threshold, sorted: the first item of a bucket, and another one."""
        edges = np.zeros(0, np.uint64)
        for records in self._bands.iter_partitions():
            pairs = np.setdiff1d(list_bucket_pairs(records), edges, assume_unique=True)
            # Keep the pairs whose signatures are similar enough.
            parts = np.split(pairs, range(ITEMS_PER_READ, len(pairs), ITEMS_PER_READ))
            similar = [part[self._compare(part) >= self._config.min_similarity] for part in parts]
            edges = sort_unique(np.concatenate([edges, *similar]))
        return edges

    def _compare(self, pairs: np.ndarray) -> np.ndarray:
        """Return the estimated Jaccard index of pairs of items, float64 [P]."""
        first, second = (read_records(self._signatures, SIGNATURE_RECORD, items)["hashes"] for items in split_pairs(pairs))
        return np.asarray((first == second).mean(1))


def list_bucket_pairs(records: np.ndarray) -> np.ndarray:
    """Return the pairs (`join_pairs`) of the first item of each bucket and the other items in it, sorted and each once."""
    # Most items are alone in their bucket (a run of equal keys) and need no further sorting.
    records = records[np.argsort(records["key"])]
    is_equal = records["key"][1:] == records["key"][:-1]
    records = records[np.append(is_equal, False) | np.append(False, is_equal)]
    records = records[np.lexsort((records["item"], records["row_hash"], records["key"]))]
    starts = np.flatnonzero(np.append(True, records["key"][1:] != records["key"][:-1])[: len(records)])
    items = records["item"]
    first = np.repeat(items[starts], np.diff(np.append(starts, len(items))))
    return sort_unique(join_pairs(first, items)[first != items])


def sort_unique(values: np.ndarray) -> np.ndarray:
    """Return values in order and each once. They are sorted in place: np.unique would take several times their memory."""
    values.sort()
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def join_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return each pair of items as one number, uint64 [P]."""
    return first << PAIR_BITS | second


def split_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the second items of pairs that `join_pairs` returned."""
    return pairs >> PAIR_BITS, pairs & np.uint64(2**32 - 1)


def read_records(file: IO[bytes], dtype: np.dtype, indices: np.ndarray) -> np.ndarray:
    """Return the records of a file at some indices. A memory map would count as memory of the process."""
    file.flush()
    size, descriptor = dtype.itemsize, file.fileno()
    records = np.empty(len(indices), dtype)
    for start in range(0, len(indices), ITEMS_PER_READ):
        part = indices[start : start + ITEMS_PER_READ].tolist()
        records[start : start + len(part)] = np.frombuffer(b"".join(os.pread(descriptor, size, size * i) for i in part), dtype)
    return records


def hash_char_ngrams(texts: Sequence[str]) -> list[np.ndarray]:
    """Return hashes of the character n-grams of each text, uint64 [N]. They are shorter if most of a text has no spaces."""
    normalized = [normalize_text(text) for text in texts]
    sizes = [choose_ngram_chars(text) for text in normalized]
    hashes = dict[int, np.ndarray]()
    # Texts with equally long n-grams are hashed as one text. N-grams that span two texts are left out.
    for size in set(sizes):
        numbers = [i for i, other in enumerate(sizes) if other == size]
        joined = "".join(normalized[i] for i in numbers)
        chars = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        runs, start = mix_bits(hash_runs(chars, size)), 0
        for i in numbers:
            end = start + len(normalized[i])
            hashes[i] = runs[start : end - size + 1]
            start = end
    return [hashes[i] for i in range(len(texts))]


def choose_ngram_chars(normalized: str) -> int:
    """Return the number of characters in an n-gram of a text, at most its length."""
    is_unspaced = not normalized.isascii() and 2 * len(UNSPACED_CHAR.findall(normalized)) > len(normalized)
    return min(UNSPACED_NGRAM_CHARS if is_unspaced else NGRAM_CHARS, len(normalized))
