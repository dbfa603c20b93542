"""Finding the index of a local shard, and knowing that it is this tar's."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

from bridle.data import index
from bridle.data.cache import ShardCache
from bridle.data.errors import ShardError

log = logging.getLogger(__name__)


def local_index(path: Path, cache: ShardCache) -> tuple[Path, index.Header]:
    """The index of a local shard: beside it, or in the cache if its folder is read-only.

    It is taken as it stands if it was made of a tar of this size, last written at this time. Any other (the tar was
    built again, or both were copied) is compared with the tar's own headers, and built again where it does not fit.

    Raises:
        ShardError: the shard cannot be read, or is damaged.
    """
    beside = path.with_name(path.name + index.SUFFIX)
    candidates = [beside, cache.index_path(str(path))]
    try:
        about = path.stat()
        for candidate in candidates:
            with contextlib.suppress(OSError, ShardError):
                header = index.read_header(candidate)
                if (header.bytes, header.mtime_ns) == (about.st_size, about.st_mtime_ns):
                    return candidate, header
        header, entries = index.scan(path)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}; check the file and its permissions") from None
    for candidate in candidates:
        fitting = _fitting(candidate, header, entries)
        if fitting is not None:
            return _kept(candidate, fitting, entries, candidates[1])
    try:
        index.write(beside, header, entries)
    except OSError as error:
        log.info("%s: %s; the index goes to the cache", beside, error.strerror)
        beside = cache.index_place(str(path))
        index.write(beside, header, entries)
    return beside, header


def _fitting(path: Path, scanned: index.Header, entries: list[index.Entry]) -> index.Header | None:
    """The header of an index that says of a tar what the tar says itself."""
    try:
        stored, found = index.read(path)
    except OSError:
        return None
    except ShardError as error:
        log.warning("%s; building it again", error)
        return None
    if stored.bytes == scanned.bytes and found == entries:
        return replace(scanned, sha256=stored.sha256)
    log.warning("%s: made for another tar than the one beside it; building it again", path)
    return None


def _kept(path: Path, header: index.Header, entries: list[index.Entry], in_cache: Path) -> tuple[Path, index.Header]:
    """An index that fits stays as it is; the cache keeps a copy that says so, and the tar is not scanned again."""
    try:
        index.write(in_cache, header, entries)
    except (OSError, ShardError) as error:
        log.debug("%s: %s; %s is compared with its tar at every start", in_cache, error, path)
        return path, header
    return in_cache, header
