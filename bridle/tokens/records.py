"""One tokenized sample, whatever format it is written in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from bridle.tokens.layouts import Ids


@dataclass(frozen=True)
class Record:
    """One sample's codes and what came with it.

    key: unique within its output. codes: int64 ``[N, M]``, N row-major over `grid`. duration_s: seconds of content,
    none without time. members: what the sample holds besides its media, as bytes by extension (``json``, ``txt``, …).
    """

    key: str
    codes: Ids
    grid: dict[str, int]
    duration_s: float | None
    members: Mapping[str, bytes] = field(default_factory=dict)

    @cached_property
    def about(self) -> dict[str, Any]:
        """KEY.json, parsed; empty without one, or where it is no object."""
        try:
            found = json.loads(self.members.get("json", b"{}"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def text(self, extension: str) -> str | None:
        """A member as text; none without it. Bytes that are not UTF-8 become U+FFFD."""
        content = self.members.get(extension)
        return None if content is None else content.decode(errors="replace")

    @property
    def labels(self) -> list[str]:
        """`labels` or `label` of KEY.json as strings, else KEY.cls; empty without any."""
        about = self.about
        found = about.get("labels", about.get("label", (self.text("cls") or "").strip()))
        return [
            utf8(str(label)) for label in (found if isinstance(found, list) else [found]) if label not in ("", None)
        ]

    @property
    def caption(self) -> str | None:
        """KEY.txt, else `caption` or `text` of KEY.json; none without any."""
        if (text := self.text("txt")) is not None:
            return text.strip()
        found = self.about.get("caption", self.about.get("text"))
        return utf8(found) if isinstance(found, str) else None


_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def utf8(text: str) -> str:
    """Text that every reader takes: bytes of a name that are not UTF-8 become ``\\xNN``, halves of characters, as a
    caption that was cut in JSON may end with, U+FFFD."""
    return _HALF.sub("\ufffd", text).encode(errors="surrogateescape").decode(errors="backslashreplace")


def code_type(codebook_size: int) -> npt.DTypeLike:
    """The smallest type that readers in every language have, and that holds all codes."""
    return np.int16 if codebook_size <= 2**15 else np.int32
