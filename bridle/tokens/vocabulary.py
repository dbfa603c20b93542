"""The whole id space of a language model: text first, then each modality's codes, then padding; as versioned JSON.

::

    0 … text - 1        the text vocabulary (none: 0)
    per modality        M * K codes, hole, begin, end, time marks (`bridle.tokens.layouts.Vocabulary`)
    size - 1            padding
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bridle.settings import nearest
from bridle.tokens.layouts import LAYOUTS, Ids, TokenError, Vocabulary, text_vocabulary

FORMAT = "bridle-vocabulary"
VERSION = 1
PARALLEL = "parallel"
ALL_LAYOUTS = (*LAYOUTS, PARALLEL)
PAD = "<|bridle:pad|>"
MAX_ID = 2**31 - 1
TIME_MARKS = 1024
"""Time-mark ids of a modality that has any."""


@dataclass(frozen=True)
class ModalityTokens:
    """How one modality's codes are written.

    ids: where its ids lie. layout: of `ALL_LAYOUTS`. delays: positions by which each codebook is moved, for `delay` and
    `parallel`; none: the layout's own. mark_s: seconds between time marks; none: no marks. model, sha256: whose codes.

    Raises:
        TokenError: an unknown layout, or marks or delays that the layout has no place for.
    """

    ids: Vocabulary
    layout: str = "interleaved"
    delays: tuple[int, ...] | None = None
    mark_s: float | None = None
    model: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in ALL_LAYOUTS:
            raise TokenError(f"layout '{self.layout}' is unknown; use one of {', '.join(ALL_LAYOUTS)}")
        if self.delays is not None and self.layout not in ("delay", PARALLEL):
            raise TokenError(f"layout {self.layout} has no delays; leave them out, or use delay or {PARALLEL}")
        if self.mark_s is not None and (self.layout not in ("interleaved", "delay") or not self.mark_s > 0):
            raise TokenError(
                f"time marks every {self.mark_s} s with layout {self.layout}: expected seconds above 0, and a layout "
                "that goes through time position by position (interleaved, delay)"
            )
        if (self.mark_s is not None) != bool(self.ids.marks):
            raise TokenError(f"{self.ids.marks} time-mark ids, but a mark every {self.mark_s} s; give both or neither")

    def encode(
        self, codes: npt.ArrayLike, grid: Mapping[str, int] | None = None, duration_s: float | None = None
    ) -> Ids:
        """Codes ``[N, M]`` to a document's ids: int64 ``[L]`` between begin and end, or ``[M, L]`` for `parallel`.

        grid, duration_s: of the stream; the time marks need them, and a stream without time gets no marks.

        Raises:
            TokenError: see `Vocabulary.flatten`.
        """
        if self.layout == PARALLEL:
            return self.ids.parallel(codes, delays=self.delays)
        flat = self.ids.flatten(codes, self.layout, delays=self.delays)
        if self.mark_s is not None and duration_s and grid:
            steps = next(iter(grid.values()))
            flat = self._marked(flat, steps, math.prod(grid.values()) // steps, duration_s / steps / self.mark_s)
        return np.concatenate([[self.ids.begin], flat, [self.ids.end]])

    def decode(self, ids: npt.ArrayLike) -> Ids:
        """The inverse of `encode`: codes, int64 ``[N, M]``.

        Raises:
            TokenError: ids that `encode` could not have written; the message says where they stand.
        """
        if self.layout == PARALLEL:
            return self.ids.from_parallel(ids, delays=self.delays)
        found = np.asarray(ids)
        if found.ndim != 1 or len(found) < 2 or (found[0], found[-1]) != (self.ids.begin, self.ids.end):
            ends = f"{found[:1].tolist()} … {found[-1:].tolist()}" if found.ndim == 1 else f"shape {list(found.shape)}"
            raise TokenError(f"ids: found {ends}, expected them between {self.ids.begin} and {self.ids.end}")
        return self.ids.unflatten(self._unmarked(found[1:-1]), self.layout, delays=self.delays)

    def _marked(self, flat: Ids, steps: int, per_step: int, marks_per_step: float) -> Ids:
        """A mark before the first step of time that begins at or after each multiple of `mark_s`."""
        number = np.floor(np.arange(steps) * marks_per_step + 1e-9).astype(np.int64)
        first = np.flatnonzero(np.diff(number, prepend=-1))
        marks = [self.ids.mark(int(number[step])) for step in first]
        return np.insert(flat, first * per_step * self.ids.codebooks, marks)

    def _unmarked(self, flat: Ids) -> Ids:
        first = self.ids.end + 1
        is_mark = (flat >= first) & (flat < first + self.ids.marks)
        at = np.flatnonzero(is_mark)
        rows, within = np.divmod(at - np.arange(len(at)), self.ids.codebooks)
        late = np.flatnonzero(within | (np.diff(rows, prepend=-1) <= 0))
        if len(late):
            where = int(at[late[0]])
            raise TokenError(f"position {where + 1}: time mark {int(flat[where])} stands where none belongs")
        return flat[~is_mark]


@dataclass(frozen=True)
class IdSpace:
    """All ids: `text` ids of the text vocabulary, then the modalities in their order, then `pad`. Made by `id_space`.

    tokenizer: what the text vocabulary is, for people; none without text.
    """

    text: int
    modalities: Mapping[str, ModalityTokens]
    tokenizer: str | None = None

    @property
    def pad(self) -> int:
        """The id that fills up packed sequences."""
        return self.text + sum(tokens.ids.size for tokens in self.modalities.values())

    @property
    def size(self) -> int:
        """Ids in all: rows of the language model's embedding."""
        return self.pad + 1

    def of(self, modality: str) -> ModalityTokens:
        """One modality.

        Raises:
            TokenError: it is not in this id space.
        """
        if modality not in self.modalities:
            raise TokenError(f"modality '{modality}' is not in this vocabulary{nearest(modality, self.modalities)}")
        return self.modalities[modality]

    def where(self, token: int) -> str:
        """What an id means, for messages and reports: its added token, or ``text 17``.

        Raises:
            TokenError: beyond the id space.
        """
        if not 0 <= token < self.size:
            raise TokenError(f"id {token}: expected 0 to {self.size - 1}")
        return f"text {token}" if token < self.text else self.added_tokens()[token - self.text]

    def added_tokens(self) -> list[str]:
        """The text tokens behind the text vocabulary, in the order of their ids."""
        found: list[str] = []
        for name, tokens in self.modalities.items():
            found += text_vocabulary(name, tokens.ids.codebooks, tokens.ids.codebook_size)
            found += [f"<|{name}:t:{mark}|>" for mark in range(tokens.ids.marks)]
        return [*found, PAD]

    def as_json(self) -> dict[str, Any]:
        """Plain data; `id_space_from_json` reads it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "size": self.size,
            "pad": self.pad,
            "text": {"size": self.text, "tokenizer": self.tokenizer},
            "modalities": [_block_as_json(name, tokens) for name, tokens in self.modalities.items()],
        }


def _block_as_json(name: str, tokens: ModalityTokens) -> dict[str, Any]:
    ids = tokens.ids
    return {
        "modality": name,
        "offset": ids.offset,
        "size": ids.size,
        "codebooks": ids.codebooks,
        "codebook_size": ids.codebook_size,
        "codebook_offsets": [ids.offset + book * ids.codebook_size for book in range(ids.codebooks)],
        "hole": ids.hole,
        "begin": ids.begin,
        "end": ids.end,
        "time_marks": ids.marks,
        "time_mark_seconds": tokens.mark_s,
        "layout": tokens.layout,
        "delays": None if tokens.delays is None else list(tokens.delays),
        "model": tokens.model,
        "model_sha256": tokens.sha256,
    }


def id_space(
    modalities: Mapping[str, ModalityTokens] | Sequence[tuple[str, ModalityTokens]],
    text: int = 0,
    tokenizer: str | None = None,
) -> IdSpace:
    """An id space with every modality's offset set: one behind the other, after `text` ids of text.

    Raises:
        TokenError: no modality, one twice, a negative number, or more ids than 32 bits hold.
    """
    pairs = list(modalities.items()) if isinstance(modalities, Mapping) else list(modalities)
    if not pairs or len({name for name, _ in pairs}) < len(pairs):
        raise TokenError(f"modalities {[name for name, _ in pairs]}: expected at least one, and each once")
    offset, placed = text, {}
    for name, tokens in pairs:
        placed[name] = replace(tokens, ids=replace(tokens.ids, offset=offset))
        offset += tokens.ids.size
    if offset > MAX_ID:
        raise TokenError(f"ids 0 to {offset}: all formats hold ids of 32 bits, at most {MAX_ID}; take a smaller offset")
    return IdSpace(text, placed, tokenizer)


def id_space_from_json(raw: Any, where: str) -> IdSpace:
    """Reads `IdSpace.as_json`.

    where: the file, for messages.

    Raises:
        TokenError: another format or version, a missing field, or numbers that contradict each other.
    """
    try:
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise TokenError(
                f"{where}: found {raw['format']!r} version {raw['version']!r}, expected {FORMAT} version {VERSION}"
            )
        blocks = []
        for block in raw["modalities"]:
            ids = Vocabulary(block["codebooks"], block["codebook_size"], marks=block["time_marks"])
            delays = None if block["delays"] is None else tuple(block["delays"])
            tokens = ModalityTokens(
                ids, block["layout"], delays, block["time_mark_seconds"], block["model"], block["model_sha256"]
            )
            blocks.append((block["modality"], tokens))
        found = id_space(blocks, raw["text"]["size"], raw["text"]["tokenizer"])
    except (KeyError, TypeError) as error:
        raise TokenError(f"{where}: not a vocabulary ({type(error).__name__}: {error}); write it again") from None
    if found.as_json() != raw:
        wrong = next(key for key, value in found.as_json().items() if value != raw.get(key))
        raise TokenError(f"{where}: {wrong} contradicts the rest: found {json.dumps(raw.get(wrong))[:200]}")
    return found
