"""Code streams to the flat token ids and text tokens of language models, and back. Every layout is a bijection.

With M codebooks of K codes, code k of codebook m has the id ``offset + m * K + k``: each codebook has its own K ids
(AnyGPT's `id + K * layer`). The ids after them, from ``offset + M * K`` on, are the hole, the begin, the end and the
time marks.

| layout | order of the ids | who does so |
| --- | --- | --- |
| `interleaved` | position by position, all M codes of one before the next | AnyGPT, SpeechGPT |
| `delay` | as `interleaved`, codebook m moved m positions later; holes where nothing is | MusicGen, Moshi |
| `coarse_first` | all of codebook 0, then all of codebook 1, ... | AudioLM, VALL-E |

`Vocabulary.parallel` gives M rows side by side instead of one flat row, for models with an embedding per codebook
(MusicGen's and Moshi's inputs).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from bridle.errors import MistakeError

Layout = Literal["interleaved", "delay", "coarse_first"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
Ids = npt.NDArray[np.int64]

_TEXT_TOKEN = re.compile(r"<\|(/?)([a-z]+)(?::(?:(\d{1,4}):(\d{1,9})|(hole)))?\|>")


class TokenError(MistakeError):
    """Ids, codes or text that no layout could have written; the message says where."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one modality's codes inside a language model's vocabulary.

    Args:
        codebooks: M; codebook_size: K.
        offset: the first id; most often the size of the text vocabulary.
        marks: time-mark ids, behind the end token.

    Raises:
        TokenError: sizes that are not positive, or an offset or a number of marks below 0.
    """

    codebooks: int
    codebook_size: int
    offset: int = 0
    marks: int = 0

    def __post_init__(self) -> None:
        if self.codebooks < 1 or self.codebook_size < 1:
            raise TokenError(f"{self.codebooks} codebooks of {self.codebook_size} codes: expected at least 1 and 1")
        if not 0 <= self.offset < 2**62:
            raise TokenError(f"offset {self.offset}: expected 0 or more")
        if self.marks < 0:
            raise TokenError(f"{self.marks} time marks: expected 0 or more")

    @property
    def hole(self) -> int:
        """The id that stands where the delay layout has no code: the one after the last code."""
        return self.offset + self.codebooks * self.codebook_size

    @property
    def begin(self) -> int:
        """The id before a stream."""
        return self.hole + 1

    @property
    def end(self) -> int:
        """The id after a stream."""
        return self.hole + 2

    @property
    def size(self) -> int:
        """Ids in all: of the codes, the three special ones and the time marks."""
        return self.codebooks * self.codebook_size + 3 + self.marks

    def mark(self, number: int) -> int:
        """The id of time mark `number`; they come round again, so that a stream of any length can be marked.

        Raises:
            TokenError: the vocabulary has no time marks.
        """
        if not self.marks:
            raise TokenError("the vocabulary has no time marks; make one that does")
        return self.end + 1 + number % self.marks

    def flatten(self, codes: npt.ArrayLike, layout: str = "interleaved", *, delays: Sequence[int] | None = None) -> Ids:
        """Codes ``[N, M]`` to flat ids, int64 ``[L]``; L is N M, or (N + max(delays)) M for `delay`.

        delays: positions by which each codebook is moved; 0, 1, ..., M-1 (MusicGen) unless given (Moshi: 0, 1, 1, ...).

        Raises:
            TokenError: wrong shape, codes out of range, unknown layout, wrong delays.
        """
        checked = self._checked(codes)
        ids = checked + self.offset + np.arange(self.codebooks, dtype=np.int64) * self.codebook_size
        if known_layout(layout) == "coarse_first":
            return np.ascontiguousarray(ids.T).reshape(-1)
        if layout == "delay":
            shifts = self._delays(delays)
            delayed = np.full((len(ids) + max(shifts), self.codebooks), self.hole, np.int64)
            for book, shift in enumerate(shifts):
                delayed[shift : shift + len(ids), book] = ids[:, book]
            ids = delayed
        return ids.reshape(-1)

    def unflatten(self, ids: npt.ArrayLike, layout: str = "interleaved", *, delays: Sequence[int] | None = None) -> Ids:
        """The inverse of `flatten`: ids ``[L]`` to codes, int64 ``[N, M]``.

        Raises:
            TokenError: a length that is no multiple of M, an id of another codebook or outside the vocabulary, a hole
                where a code must stand or a code where a hole must.
        """
        flat = _integers(ids, "ids")
        if flat.ndim != 1 or len(flat) % self.codebooks:
            raise TokenError(f"ids: found shape {list(flat.shape)}, expected a multiple of {self.codebooks} ids")
        if known_layout(layout) == "coarse_first":
            rows = np.ascontiguousarray(flat.reshape(self.codebooks, -1).T)
        else:
            rows = flat.reshape(-1, self.codebooks)
        if layout == "delay" and len(rows):
            rows = self._undelayed(rows, self._delays(delays))
        codes = rows - self.offset - np.arange(self.codebooks, dtype=np.int64) * self.codebook_size
        wrong = np.argwhere((codes < 0) | (codes >= self.codebook_size))
        if len(wrong):
            position, book = (int(i) for i in wrong[0])
            low = self.offset + book * self.codebook_size
            raise TokenError(
                f"position {position}, codebook {book}: found id {int(rows[position, book])}, "
                f"expected {low} to {low + self.codebook_size - 1}; check layout, offset and model"
            )
        return codes

    def parallel(self, codes: npt.ArrayLike, *, delays: Sequence[int] | None = None) -> Ids:
        """Codes ``[N, M]`` to M rows of ids, int64 ``[M, N + max(delays)]``; no delays unless given.

        Raises:
            TokenError: as `flatten`.
        """
        shifts = delays if delays is not None else [0] * self.codebooks
        return np.ascontiguousarray(self.flatten(codes, "delay", delays=shifts).reshape(-1, self.codebooks).T)

    def from_parallel(self, ids: npt.ArrayLike, *, delays: Sequence[int] | None = None) -> Ids:
        """The inverse of `parallel`: ids ``[M, L]`` to codes, int64 ``[N, M]``.

        Raises:
            TokenError: another number of rows, or as `unflatten`.
        """
        rows = _integers(ids, "ids")
        if rows.ndim != 2 or len(rows) != self.codebooks:
            raise TokenError(f"ids: found shape {list(rows.shape)}, expected [{self.codebooks}, L]")
        shifts = delays if delays is not None else [0] * self.codebooks
        return self.unflatten(rows.T.reshape(-1), "delay", delays=shifts)

    def _checked(self, codes: npt.ArrayLike) -> Ids:
        array = _integers(codes, "codes")
        if array.ndim != 2 or array.shape[1] != self.codebooks:
            raise TokenError(f"codes: found shape {list(array.shape)}, expected [N, {self.codebooks}]")
        if array.size and (array.min() < 0 or array.max() >= self.codebook_size):
            raise TokenError(
                f"codes: found {int(array.min())} to {int(array.max())}, expected 0 to {self.codebook_size - 1}"
            )
        return array

    def _delays(self, delays: Sequence[int] | None) -> Sequence[int]:
        if delays is None:
            return range(self.codebooks)
        if len(delays) != self.codebooks or min(delays) < 0:
            raise TokenError(f"delays {list(delays)}: expected {self.codebooks} numbers of 0 or more")
        return delays

    def _undelayed(self, rows: Ids, shifts: Sequence[int]) -> Ids:
        count = len(rows) - max(shifts)
        if count < 0:
            raise TokenError(f"ids: {len(rows)} positions are fewer than the longest delay, {max(shifts)}")
        holes = np.ones(rows.shape, bool)
        codes = np.empty((count, self.codebooks), np.int64)
        for book, shift in enumerate(shifts):
            holes[shift : shift + count, book] = False
            codes[:, book] = rows[shift : shift + count, book]
        if not (rows[holes] == self.hole).all():
            raise TokenError(f"ids: a code stands where the delay pattern has its hole, id {self.hole}")
        return codes


def known_layout(layout: str) -> str:
    """The layout itself.

    Raises:
        TokenError: no such layout.
    """
    if layout not in LAYOUTS:
        raise TokenError(f"layout '{layout}' is unknown; use one of {', '.join(LAYOUTS)}")
    return layout


def text_vocabulary(modality: str, codebooks: int, codebook_size: int) -> list[str]:
    """The text tokens to add to a tokenizer, in the order of the ids of `Vocabulary`: codes, hole, begin, end."""
    codes = [f"<|{modality}:{m}:{k}|>" for m in range(codebooks) for k in range(codebook_size)]
    return [*codes, f"<|{modality}:hole|>", f"<|{modality}|>", f"<|/{modality}|>"]


def to_text(modality: str, codes: npt.ArrayLike, vocabulary: Vocabulary, layout: str = "interleaved") -> str:
    """Codes ``[N, M]`` as one string of text tokens, between a begin and an end token.

    Raises:
        TokenError: as `Vocabulary.flatten`.
    """
    plain = Vocabulary(vocabulary.codebooks, vocabulary.codebook_size)
    flat = plain.flatten(codes, layout).tolist()
    size, hole = plain.codebook_size, plain.hole
    tokens = [f"<|{modality}:hole|>" if i == hole else f"<|{modality}:{i // size}:{i % size}|>" for i in flat]
    return "".join([f"<|{modality}|>", *tokens, f"<|/{modality}|>"])


def from_text(text: str, vocabulary: Vocabulary, layout: str = "interleaved") -> tuple[str, Ids]:
    """The inverse of `to_text`: the modality and codes, int64 ``[N, M]``.

    Raises:
        TokenError: anything but text tokens of one modality, in the order of the layout.
    """
    plain = Vocabulary(vocabulary.codebooks, vocabulary.codebook_size)
    at, ids, modality, ended = 0, [], "", False
    for match in _TEXT_TOKEN.finditer(text):
        closing, name, book, code, hole = match.groups()
        first = at == 0
        ends = bool(closing)
        bare = book is None and hole is None
        if match.start() != at or ended or first != (bare and not ends) or (not first and name != modality):
            raise TokenError(f"character {at}: found {text[at : at + 32]!r}, which does not belong there")
        if ends and not bare:
            raise TokenError(f"character {at}: found {text[at : at + 32]!r}, which is no token")
        modality, ended, at = name, ends, match.end()
        if hole is not None:
            ids.append(plain.hole)
        elif book is not None:
            if int(book) >= plain.codebooks or int(code) >= plain.codebook_size:
                raise TokenError(f"{match[0]}: expected codebooks below {plain.codebooks} of {plain.codebook_size}")
            ids.append(int(book) * plain.codebook_size + int(code))
    if not ended or at != len(text):
        raise TokenError(f"character {at}: expected tokens between <|modality|> and <|/modality|>")
    return modality, plain.unflatten(np.array(ids, np.int64), layout)


def _integers(values: Any, name: str) -> Ids:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise TokenError(f"{name}: expected rows of equal length") from None
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TokenError(f"{name}: found {array.dtype}, expected integers")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise TokenError(f"{name}: numbers above the range of 64-bit integers")
    return array.astype(np.int64, copy=False)
