"""From what a user writes to shards: paths, globs, braces, URLs, ``pipe:``, ``builtin:``."""

from __future__ import annotations

import glob
import logging
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from bridle.config import WEIGHTS
from bridle.data import fetch
from bridle.data.errors import ShardError, UnavailableError
from bridle.remote.access import GLOB, WEB, is_url, unknown_scheme
from bridle.settings import RecipeError, nearest

log = logging.getLogger(__name__)
BUILTIN = "builtin:"
BUILD = "check the path, or build shards with `bridle shards build`"


def is_remote(url: str) -> bool:
    """Whether a shard must be fetched before it can be read by offset."""
    return url.startswith(fetch.PIPE) or is_url(url)


def split_weight(word: str) -> tuple[str, float | None]:
    """``music/*.tar@2.5`` as the pattern and its weight; none without one.

    A weight is what follows the last ``@``, unless that holds a ``/`` or a space or ends in ``.tar``.

    Raises:
        RecipeError: it is no number, or out of bounds.
    """
    pattern, mark, text = word.rpartition("@")
    if not mark or re.search(r"[/\s]|\.tar$", text):
        return word, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        expected = f"a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}"
        fix = f"if '@{text}' belongs to the name, write '{word}@1'"
        raise RecipeError(f"shards '{word}': weight '{text}' is not {expected} ({fix})")
    return pattern, weight


def expand(patterns: Sequence[str]) -> list[str]:
    """All shards that the patterns name, in their order, each once; local ones as absolute paths.

    Raises:
        ShardError: an empty list, a pattern that matches nothing, or one of an unknown kind.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    if not patterns:
        raise ShardError("the list of shards is empty; give at least one path, glob or URL of a .tar")
    found = [url for pattern in patterns for url in _expand_one(str(pattern))]
    once = list(dict.fromkeys(found))
    if len(once) < len(found):
        log.warning("%d shards are named more than once; each is read once", len(found) - len(once))
    return once


def _expand_one(pattern: str) -> list[str]:
    if not pattern.strip():
        raise ShardError("a pattern of shards is empty; give a path, glob or URL of a .tar")
    if pattern.startswith(BUILTIN):
        return _builtin(pattern.removeprefix(BUILTIN))
    if "://" in pattern and not pattern.startswith(fetch.PIPE):
        if (fault := unknown_scheme(pattern)) is not None:
            raise ShardError(f"shards '{pattern}': {fault}")
        scheme, _, place = pattern.partition("://")
        if scheme not in WEB and not place.partition("/")[2]:
            raise ShardError(f"shards '{pattern}': expected {scheme}://BUCKET/KEY.tar")
    if is_remote(pattern):
        return [url for part in _braces(pattern) for url in _remote(part, pattern)]
    if Path(pattern).is_file():
        return [str(Path(pattern).absolute())]
    return [path for part in _braces(pattern) for path in _local(part, pattern)]


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        if pattern.startswith(fetch.PIPE):
            return [pattern]  # a shell command may hold a lone brace
        raise ShardError(f"shards '{pattern}': the braces do not match; write {{0000..0099}} or {{a,b}}") from None


def _remote(url: str, pattern: str) -> list[str]:
    scheme, _, place = url.partition("://")
    looked = urlsplit(url).path if scheme in WEB else place  # in a store a question mark begins no query
    if url.startswith(fetch.PIPE) or not GLOB & set(looked):
        return [url]
    if scheme in WEB:
        raise ShardError(
            f"shards '{pattern}': a web server cannot be searched; write braces, for example {{0000..0099}}"
        )
    found = fetch.search(url)
    if not found:
        raise UnavailableError(f"shards '{pattern}': matches nothing; check the bucket and the prefix")
    return found


def _local(path: str, pattern: str) -> list[str]:
    if Path(path).is_dir():
        raise ShardError(f"shards '{pattern}': '{path}' is a folder; write '{path.rstrip('/')}/*.tar'")
    if GLOB & set(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())  # noqa: PTH207
        return [str(Path(file).absolute()) for file in found] or _nothing(pattern)
    if not Path(path).is_file():
        raise ShardError(f"shards '{pattern}': no such file '{path}'; {BUILD}")
    return [str(Path(path).absolute())]


def _nothing(pattern: str) -> list[str]:
    raise ShardError(f"shards '{pattern}': matches nothing; {BUILD}")


def _builtin(name: str) -> list[str]:
    folder = Path(str(resources.files("bridle") / "data" / "sample"))
    prefix = name if name.endswith("-heldout") else f"{name}-train"
    found = sorted(str(file) for file in folder.glob("*.tar") if file.name.rpartition("-")[0] == prefix)
    if not found:
        known = {file.name.rpartition("-")[0].removesuffix("-train") for file in folder.glob("*.tar")}
        raise ShardError(f"shards 'builtin:{name}': no such sample{nearest(name, known)}")
    return found
