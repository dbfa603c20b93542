"""What a language model reads of a sample: its codes, alone or within text, by a template; as ids or as text."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bridle.settings import RecipeError
from bridle.tokens.layouts import Ids
from bridle.tokens.records import Record, utf8
from bridle.tokens.text import text_ids
from bridle.tokens.vocabulary import PARALLEL, IdSpace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CODES = "codes"
PLAIN = "{codes}"
_FIELD = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"codes|key|label|caption|json\.[^{}]+|[A-Za-z0-9_.-]+")


class Template:
    """Literal text and fields in braces: ``A sound of {label}: {codes}``.

    ``{codes}`` is the stream, ``{key}``, ``{label}`` (several joined by commas) and ``{caption}`` say what they say,
    ``{json.a.b}`` is a field of KEY.json, any other ``{txt}`` the text of KEY.txt. What a sample lacks is left empty.

    Raises:
        RecipeError: braces that do not match, no ``{codes}`` or several, or a field that is no name.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        parts = _FIELD.split(source)
        self.parts = [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
        fields = [part for part, is_field in self.parts if is_field]
        wrong = next((name for name in fields if not _NAME.fullmatch(name)), None)
        if wrong is not None or "{" in "".join(parts[::2]) or "}" in "".join(parts[::2]) or "" in parts[1::2]:
            found = f"'{{{wrong}}}'" if wrong else "braces that do not match"
            raise RecipeError(
                f"--template: found {found}, expected fields such as {{codes}}, {{txt}}, {{json.caption}}"
            )
        if fields.count(CODES) != 1:
            raise RecipeError(f"--template '{source}': holds {{codes}} {fields.count(CODES)} times, expected once")

    @property
    def has_text(self) -> bool:
        """Whether there is anything besides the codes."""
        return self.source != PLAIN

    def pieces(self, record: Record) -> list[str | None]:
        """Text, codes (none) and text; neighbouring texts are joined, empty ones left out."""
        found: list[str | None] = []
        for part, is_field in self.parts:
            text = _value(record, part) if is_field else part
            if text is None or not found or found[-1] is None:
                found.append(text)
            else:
                found[-1] = f"{found[-1]}{text}"
        return [piece for piece in found if piece != ""]


def _value(record: Record, name: str) -> str | None:
    if name == CODES:
        return None
    if name == "key":
        return utf8(record.key)
    if name == "label":
        return ", ".join(record.labels)
    if name == "caption":
        return record.caption or ""
    if not name.startswith("json."):
        return (record.text(name) or "").strip()
    value: Any = record.about
    for step in name.split(".")[1:]:
        value = value.get(step) if isinstance(value, dict) else None
    if value is None:
        return ""
    return utf8(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


class Documents:
    """Records to ids and text.

    Args:
        space: the ids; modality: whose codes; tokenizer: for the template's text; rate: the modality's positions a
            second, where it has a constant one.

    Raises:
        RecipeError: text without a tokenizer or a vocabulary for it, or around a layout of several rows.
    """

    def __init__(
        self,
        space: IdSpace,
        modality: str,
        template: Template,
        tokenizer: Tokenizer | None,
        rate: float | None = None,
    ) -> None:
        self.space, self.template, self.tokenizer, self.rate = space, template, tokenizer, rate
        self.modality = modality
        self.tokens = space.of(modality)
        if template.has_text and self.tokens.layout == PARALLEL:
            raise RecipeError(f"--template: text has no place in layout {PARALLEL}; use another layout")

    @property
    def flat(self) -> bool:
        """Whether a document is one row of ids (else M)."""
        return self.tokens.layout != PARALLEL

    def stream(self, record: Record) -> Ids:
        """The ids of a record's codes alone: int64 ``[L]``, or ``[M, L]`` for `parallel`."""
        seconds = record.duration_s
        if seconds is not None and self.rate is not None:
            seconds = len(record.codes) / self.rate  # the last step may reach beyond the content, and counts whole
        return self.tokens.encode(record.codes, record.grid, seconds)

    def ids(self, record: Record) -> Ids:
        """int64 ``[L]``, or ``[M, L]`` for `parallel`.

        Raises:
            RecipeError: the template has text, and there is no tokenizer.
        """
        stream = self.stream(record)
        if not self.template.has_text:
            return stream
        if self.tokenizer is None:
            raise RecipeError("--template: its text becomes ids by a text tokenizer; name one with --tokenizer")
        pieces = self.template.pieces(record)
        return np.concatenate([stream if piece is None else text_ids(self.tokenizer, piece) for piece in pieces])

    def text(self, record: Record) -> str:
        """The same as text, with a text token for every id of the stream."""
        ids = self.stream(record).tolist()
        stream = "".join(self._names[token - self.space.text] for token in ids)
        return "".join(stream if piece is None else piece for piece in self.template.pieces(record))

    @cached_property
    def _names(self) -> list[str]:
        return self.space.added_tokens()
