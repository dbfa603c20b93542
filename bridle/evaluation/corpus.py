"""What a tokenized corpus holds, measured in one pass over its codes, and a second one for examples.

Entropies are in bits, and of the counts as they are: given the position (within the model's window, which a long stream
goes through again and again) they come out too low where a position has been seen seldom; `seen_per_position` says how
often.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bridle.errors import MistakeError
from bridle.tokens.corpus import Corpus, Row

Codes = npt.NDArray[np.int64]
TABLE_CELLS = 1 << 26
"""Counts kept for the entropy given the position; beyond, positions are those within a step of time."""
NGRAM = 3
KEPT_NGRAMS = 1 << 20
TOP = 10
LONG_RUNS = 20


@dataclass
class Run:
    """One code that stays: `steps` along the first axis (time, or height) at one place of the others."""

    steps: int
    key: str
    codebook: int
    code: int
    first: int
    """Step at which it begins."""


@dataclass
class Measured:
    """Figures of a corpus; see `measure`."""

    clips: int = 0
    positions: int = 0
    seconds: float = 0.0
    counts: Codes = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    at_position: Codes = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    ngrams: Counter[tuple[int, ...]] = field(default_factory=Counter)
    ngram_examples: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    duplicate_clips: int = 0
    by_label: Counter[str] = field(default_factory=Counter)


def measure(corpus: Corpus) -> Measured:
    """Reads a corpus twice.

    Raises:
        ValueError: there is nothing in it, or it is damaged.
        OSError: it cannot be read.
    """
    found = Measured()
    digests: list[int] = []
    longest: list[tuple[int, int, int, Run]] = []
    for row in corpus:
        if not found.clips:
            _begin(found, corpus, row)
        _count(found, row)
        digests.append(_digest(row.codes))
        for run in _runs(row):
            heapq.heappush(longest, (run.steps, -found.clips, -run.codebook, run))
            if len(longest) > LONG_RUNS:
                heapq.heappop(longest)
    if not found.clips:
        raise MistakeError(f"{corpus.store.address}: holds no clip")
    found.runs = [run for *_, run in sorted(longest, key=lambda one: one[:3], reverse=True)]
    found.ngrams = Counter(dict(found.ngrams.most_common(TOP)))
    _examples(found, corpus, np.array(digests, np.uint64))
    return found


def _begin(found: Measured, corpus: Corpus, row: Row) -> None:
    books, size = corpus.model["codebooks"], corpus.model["codebook_size"]
    whole = math.prod(corpus.model["grid"].values())
    across = len(row.codes) // next(iter(row.grid.values()))
    positions = whole if whole * books * size <= TABLE_CELLS else across
    found.counts = np.zeros((books, size), np.int64)
    found.at_position = np.zeros((positions, books, size), np.int64)


def _count(found: Measured, row: Row) -> None:
    codes = row.codes
    found.clips += 1
    found.positions += len(codes)
    found.seconds += row.duration_s or 0.0
    found.by_label.update(row.labels)
    place = np.arange(len(codes)) % len(found.at_position)
    for book in range(codes.shape[1]):
        found.counts[book] += np.bincount(codes[:, book], minlength=found.counts.shape[1])
        np.add.at(found.at_position[:, book], (place, codes[:, book]), 1)
    found.ngrams.update(_ngrams(row))
    if len(found.ngrams) > 2 * KEPT_NGRAMS:
        found.ngrams = Counter(dict(found.ngrams.most_common(KEPT_NGRAMS)))


def _ngrams(row: Row) -> list[tuple[int, ...]]:
    """Of the coarsest codebook, along the first axis, at every place of the others."""
    lines = _lines(row, 0)
    return [tuple(line[i : i + NGRAM]) for line in lines.tolist() for i in range(len(line) - NGRAM + 1)]


def _lines(row: Row, book: int) -> Codes:
    """Codes of one codebook: a line along the first axis for each place of the others."""
    return row.codes[:, book].reshape(next(iter(row.grid.values())), -1).T


def _runs(row: Row) -> list[Run]:
    """The longest run of each codebook of a clip."""
    found = []
    for book in range(row.codes.shape[1]):
        best = Run(0, row.key, book, 0, 0)
        for line in _lines(row, book):
            edges = np.flatnonzero(np.diff(line, prepend=-1, append=-1))
            lengths = np.diff(edges)
            at = int(lengths.argmax())
            if lengths[at] > best.steps:
                best = Run(int(lengths[at]), row.key, book, int(line[edges[at]]), int(edges[at]))
        found.append(best)
    return found


def _digest(codes: Codes) -> int:
    shape = np.array(codes.shape, np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(shape + codes.tobytes(), digest_size=8).digest(), "little")


def _examples(found: Measured, corpus: Corpus, digests: npt.NDArray[np.uint64]) -> None:
    """Names the clips that have the same codes, and those that hold the commonest n-grams."""
    values, times = np.unique(digests, return_counts=True)
    twice = {int(value) for value in values[times > 1]}
    groups: dict[int, list[str]] = {}
    wanted = set(found.ngrams)
    for number, row in enumerate(corpus):
        if (digest := int(digests[number])) in twice:
            groups.setdefault(digest, []).append(row.key)
        for ngram in wanted & set(_ngrams(row)) if wanted else ():
            found.ngram_examples.setdefault(ngram, []).append(row.key)
        wanted = {ngram for ngram in wanted if len(found.ngram_examples.get(ngram, [])) < 3}
    found.duplicates = sorted(groups.values(), key=lambda keys: (-len(keys), keys))
    found.duplicate_clips = sum(len(keys) - 1 for keys in found.duplicates)


def entropy(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Bits: ``[..., K]`` counts to ``[...]``; 0 without any."""
    total = counts.sum(-1, keepdims=True)
    share = counts / np.maximum(total, 1)
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)


def figures(corpus: Corpus, found: Measured) -> dict[str, Any]:
    """Everything as plain data."""
    seen = found.at_position[:, 0].sum(-1)
    given = (entropy(found.at_position) * seen[:, None]).sum(0) / max(1, seen.sum())
    alone = entropy(found.counts)
    seconds = found.seconds or None
    books, size = found.counts.shape
    return {
        "model": corpus.model,
        "clips": found.clips,
        "hours": found.seconds / 3600 if seconds else None,
        "positions": found.positions,
        "codes": found.positions * books,
        "tokens": corpus.manifest["summary"]["tokens"],
        "skipped": corpus.manifest["summary"]["skipped"],
        "codes_per_second": found.positions * books / seconds if seconds else None,
        "bits_per_second": found.positions * float(alone.sum()) / seconds if seconds else None,
        "bits_per_second_given_position": found.positions * float(given.sum()) / seconds if seconds else None,
        "bits_per_clip": found.positions * float(alone.sum()) / found.clips,
        "seen_per_position": float(seen.mean()),
        "codebooks": [
            {
                "codebook": book + 1,
                "used": int((found.counts[book] > 0).sum()),
                "size": size,
                "entropy_bits": float(alone[book]),
                "entropy_bits_given_position": float(given[book]),
                "commonest_share": float(found.counts[book].max() / max(1, found.counts[book].sum())),
            }
            for book in range(books)
        ],
        "duplicate_clips": found.duplicate_clips,
        "duplicates": found.duplicates[:TOP],
        "longest_runs": [vars(run) | {"codebook": run.codebook + 1} for run in found.runs[:TOP]],
        "commonest_ngrams": [
            {"codes": list(ngram), "times": times, "clips": found.ngram_examples.get(ngram, [])}
            for ngram, times in found.ngrams.most_common(TOP)
        ],
        "labels": dict(found.by_label.most_common(100)),
    }
