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

    It is taken as it stands if it has the tar's size and time of writing (see `index.write`). Any other (the tar was
    built again, or the two were copied) is compared with the tar's own headers, and built again where it does not fit.

    Raises:
        ShardError: the shard cannot be read, or is damaged.
    """
    beside, cached = path.with_name(path.name + index.SUFFIX), cache.index_path(str(path))
    try:
        about = path.stat()
        for candidate in (beside, cached):
            with contextlib.suppress(OSError, ShardError):
                header = index.read_header(candidate)
                if header.bytes == about.st_size and _same_time(candidate, about.st_mtime_ns, ours=candidate == cached):
                    return candidate, header
        header, entries = index.scan(path)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}; check the file and its permissions") from None
    for candidate in (beside, cached):
        fitting = _fitting(candidate, header, entries)
        if fitting is not None:
            return _noted(candidate, fitting, entries, cached, about.st_mtime_ns)
    try:
        index.write(beside, header, entries, about.st_mtime_ns)
    except OSError as error:
        log.info("%s: %s; the index goes to the cache", beside, error.strerror)
        beside = cache.index_place(str(path))
        index.write(beside, header, entries, about.st_mtime_ns)
    return beside, header


def _same_time(candidate: Path, tar_mtime_ns: int, *, ours: bool) -> bool:
    """Whole seconds prove nothing outside our cache: unpacking an archive gives many files the same one."""
    return candidate.stat().st_mtime_ns == tar_mtime_ns and (ours or tar_mtime_ns % 1_000_000_000 != 0)


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
    log.warning("%s: made for another tar than the one that is there; building it again", path)
    return None


def _noted(
    path: Path, header: index.Header, entries: list[index.Entry], cached: Path, mtime_ns: int
) -> tuple[Path, index.Header]:
    """An index that fits stays as it is; the cache keeps a copy that says so, and the tar is not scanned again."""
    try:
        index.write(cached, header, entries, mtime_ns)
    except (OSError, ShardError) as error:
        log.debug("%s: %s; %s is compared with its tar at every start", cached, error, path)
        return path, header
    return cached, header
