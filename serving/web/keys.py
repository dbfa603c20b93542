"""API keys: known only by their hashes, compared in constant time, each with scopes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bridle.settings import RecipeError
from serving.settings import ServeSettings

SCOPES = ("use", "metrics", "admin")
"""`use`: tokenize, encode, classify, dequantize, info, pages. `metrics`: /metrics. `admin`: reload."""
CHECK_EVERY = 1.0
"""Seconds between looks at the keys' file."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([a-z+]+):([0-9a-f]{64})")


@dataclass(frozen=True)
class Key:
    """One key: who, what for, and its SHA-256. Keys are random (`new_key`), so a fast hash is enough."""

    name: str
    scopes: frozenset[str]
    digest: str


def digest(key: str) -> str:
    """Hexadecimal SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(name: str, scopes: tuple[str, ...] = ("use",)) -> tuple[str, str]:
    """A random key of 256 bits, and the line that lets the service know it.

    Raises:
        RecipeError: a name or a scope that no key may have.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(f"--new-key {name!r}: expected a name of up to 64 letters, digits, '.', '_' and '-'")
    if unknown := set(scopes) - set(SCOPES):
        raise RecipeError(f"--scopes: found {min(unknown)!r}, expected some of {', '.join(SCOPES)}, joined by +")
    key = "bridle_" + secrets.token_urlsafe(32)
    line = f"{name}:{'+'.join(scopes)}:{digest(key)}"
    return key, line


def parse_keys(text: str, where: str) -> list[Key]:
    """Keys, one a line or comma-separated; empty lines and those that begin with # are skipped.

    Raises:
        RecipeError: no key at all, a line that is none, the hash of the empty key, two keys of one name.
    """
    lines = [line.strip() for row in text.splitlines() for line in row.split(",") if not row.lstrip().startswith("#")]
    keys = [_checked(line, where) for line in lines if line]
    if not keys:
        raise RecipeError(f"{where}: holds no key; make one with: bridle serve --new-key NAME")
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise RecipeError(f"{where}: two keys have one name; rename one of {', '.join(sorted(set(names)))}")
    return keys


def _checked(line: str, where: str) -> Key:
    match = _LINE.fullmatch(line)
    if match is None:
        raise RecipeError(
            f"{where}: a line is not name:scopes:sha256 (64 hex digits); make one with: bridle serve --new-key NAME"
        )
    name, scopes, found = match.groups()
    unknown = set(scopes.split("+")) - set(SCOPES)
    if unknown:
        raise RecipeError(
            f"{where}: key {name} has scope {min(unknown)!r}, expected some of {', '.join(SCOPES)}, joined by +"
        )
    if hmac.compare_digest(found, digest("")):
        raise RecipeError(f"{where}: key {name} is the hash of an empty key, which anyone has; make another")
    return Key(name, frozenset(scopes.split("+")), found)


class KeyRing:
    """The keys that open the service; none at all means that it is open (on loopback only, see `ServeSettings`).

    Raises:
        RecipeError: see `parse_keys`; OSError: the file cannot be read.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._fixed = parse_keys(settings.api_keys, "BRIDLE_API_KEYS") if settings.api_keys is not None else []
        self._file = Path(settings.api_keys_file) if settings.api_keys_file is not None else None
        self._stamp: tuple[int, int, int] | None = None
        self._checked = time.monotonic()
        self._keys = list(self._fixed)
        self.needed = settings.has_keys
        self.reload()

    def reload(self) -> None:
        """Reads the file again.

        Raises:
            RecipeError, OSError: the keys stay as they were.
        """
        if self._file is None:
            return
        stamp = self._file_stamp()
        keys = [*self._fixed, *parse_keys(self._file.read_text(encoding="utf-8"), str(self._file))]
        self._keys, self._stamp = keys, stamp

    def refresh(self) -> None:
        """Reads the file again if it changed; looks at most once a second.

        Raises:
            RecipeError, OSError: once per change; the keys stay as they were.
        """
        now = time.monotonic()
        if self._file is None or now - self._checked < CHECK_EVERY:
            return
        self._checked = now
        stamp = self._file_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            self.reload()

    def find(self, presented: str) -> Key | None:
        """The key, or none. Takes the same time whichever key it is, and whether it is one."""
        wanted, found = digest(presented), None
        for key in self._keys:
            if hmac.compare_digest(wanted, key.digest):
                found = key
        return found

    def _file_stamp(self) -> tuple[int, int, int]:
        assert self._file is not None
        status = self._file.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in `Authorization: Bearer`, in `X-API-Key`, or the password of `Authorization: Basic` (for browsers)."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value or None
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(value, validate=True).decode("utf-8", "surrogateescape")
        except ValueError:
            return None
        return decoded.partition(":")[2] or None
    return headers.get("x-api-key") or None
