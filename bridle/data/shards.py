"""A set of shards as one list of samples, each read at its offset. Nothing is ever unpickled."""

from __future__ import annotations

import json
import logging
import math
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bridle.data import index
from bridle.data.cache import ShardCache
from bridle.data.errors import SampleError, ShardError
from bridle.data.local_index import local_index
from bridle.data.order import Source
from bridle.data.patterns import expand, is_remote
from bridle.data.tables import SharedTables
from bridle.remote.access import shown

log = logging.getLogger(__name__)
META = ("json", "cls", "txt")
LARGEST_META = 1 << 20
SHARDS_OPEN = 128
"""At most, each with two open files."""
ASKED_AT_ONCE = 16
HINTS = hasattr(os, "posix_fadvise")  # not on macOS


@dataclass(frozen=True)
class Sample:
    """shard: its URL or path. data: the member of the wanted extension. meta: small members by extension, as bytes."""

    shard: str
    key: str
    data: bytes
    extension: str
    meta: dict[str, bytes]

    @property
    def about(self) -> dict[str, Any]:
        """KEY.json, parsed; empty without one.

        Raises:
            SampleError: it is not a JSON object.
        """
        try:
            fields = json.loads(self.meta.get("json", b"{}"))
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise SampleError(f"{self.shard}: {self.key}.json is not a JSON object; build the shard again")
        return fields

    @property
    def labels(self) -> list[str]:
        """`labels` or `label` of KEY.json as strings, else KEY.cls; empty without any."""
        found = self.about.get(
            "labels", self.about.get("label", self.meta.get("cls", b"").decode(errors="replace").strip())
        )
        return [str(label) for label in (found if isinstance(found, list) else [found]) if label != ""]


@dataclass(frozen=True)
class Shard:
    """url: as given, local ones as absolute paths. count: samples that have a wanted extension."""

    url: str
    header: index.Header
    index_path: Path
    count: int

    @property
    def remote(self) -> bool:
        """Whether it is fetched into the cache before it is read."""
        return is_remote(self.url)


def open_shards(
    patterns: Sequence[str], *, extensions: Sequence[str], cache: str | None = None, cache_gb: float = 50.0
) -> ShardSet:
    """Expands patterns and opens the index of every shard, building those that are missing.

    Args:
        patterns: paths, globs, brace patterns; local, URLs of `bridle.remote`, ``pipe:COMMAND``, ``builtin:NAME``.
        extensions: of the members wanted, by preference, without a dot; empty: any that is no label.
        cache: folder for remote shards; default: the user's cache folder.
        cache_gb: bound on that folder, in 10^9 bytes.

    Raises:
        ShardError: nothing found, damaged, or no sample with a wanted extension.
    """
    shard_cache = ShardCache(cache, cache_gb)
    wanted = tuple(extension.lower().lstrip(".") for extension in extensions)
    urls = expand(patterns)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        found = list(pool.map(lambda url: _index_of(url, shard_cache), urls))
    shards = [
        Shard(url, header, path, header.with_any_of(set(wanted) or _all_but_meta(header)))
        for url, (path, header) in zip(urls, found, strict=True)
    ]
    _refuse_empty(shards, wanted)
    for shard in shards:
        if (fault := unused(shard, wanted)) is not None:
            log.warning("%s", fault)
    return ShardSet(shards, wanted, shard_cache)


def open_mixture(
    sources: Sequence[tuple[Sequence[str], float]],
    *,
    extensions: Sequence[str],
    cache: str | None = None,
    cache_gb: float = 50.0,
) -> ShardSet:
    """Several sources as one set, each as (patterns, weight); an epoch sees every sample of a source `weight` times.

    A weight counts as the decimal number that it is written as: 0.1 is exactly one in ten.

    Raises:
        ShardError: see `open_shards`; a shard in two sources; a weight that is not above 0.
    """
    opened = [open_shards(patterns, extensions=extensions, cache=cache, cache_gb=cache_gb) for patterns, _ in sources]
    owners: dict[str, int] = {}
    for number, found in enumerate(opened):
        for shard in found.shards:
            if owners.setdefault(shard.url, number) != number:
                both = f"sources {owners[shard.url]} and {number} (they count from 0)"
                raise ShardError(f"{shown(shard.url)}: belongs to {both}; name each shard in one source")
    weights = [weight for _, weight in sources]
    if not all(0 < weight < math.inf for weight in weights):
        raise ShardError(f"weights {weights} of the sources must be numbers above 0")
    parts = [
        Source(len(found.shards), Fraction(repr(float(weight)))) for found, weight in zip(opened, weights, strict=True)
    ]
    return ShardSet([shard for found in opened for shard in found.shards], opened[0].extensions, opened[0].cache, parts)


def _index_of(url: str, cache: ShardCache) -> tuple[Path, index.Header]:
    return cache.index_of(url) if is_remote(url) else local_index(Path(url), cache)


def _all_but_meta(header: index.Header) -> set[str]:
    return {extension for kind in header.kinds for extension in kind.split("+")} - set(META)


def _refuse_empty(shards: list[Shard], wanted: tuple[str, ...]) -> None:
    if any(shard.count for shard in shards):
        return
    kinds = sorted({extension for shard in shards for kind in shard.header.kinds for extension in kind.split("+")})
    names = ", ".join(shown(shard.url) for shard in shards[:3]) + (", …" if len(shards) > 3 else "")
    found = f"found only: {', '.join(kinds[:20])}" if kinds else "they hold no samples at all"
    expected = f"with a member of {', '.join(wanted)}" if wanted else "with a media member"
    raise ShardError(f"no sample {expected} in {len(shards)} shards ({names}); {found}")


def unused(shard: Shard, wanted: Sequence[str]) -> str | None:
    """What to say of samples that are not read although they look as if they should be."""
    found = shard.header.almost(set(wanted))
    if not found:
        return None
    extension, count = max(found.items(), key=lambda item: item[1])
    return (
        f"{shown(shard.url)}: {sum(found.values())} samples are not read, such as {count} of '.{extension}': a key ends"
        f" at the first dot, so that is their extension; rename KEY.{extension} to KEY.{extension.rpartition('.')[2]}"
    )


class ShardSet:
    """All samples of a list of shards, numbered through. Safe over fork and pickle; one thread at a time.

    Attributes:
        shards: `Shard` of each URL, in order.
        extensions: wanted members, by preference.
        sources: runs of neighbouring shards with the weights of their samples; without any, all weigh 1.
    """

    def __init__(
        self, shards: list[Shard], extensions: tuple[str, ...], cache: ShardCache, sources: Sequence[Source] = ()
    ) -> None:
        self.shards, self.extensions, self.cache, self.sources = shards, extensions, cache, sources
        self._ends = list(accumulate(shard.count for shard in shards))
        self._names = [shown(shard.url) for shard in shards]
        self._shared = SharedTables(cache.folder / "tables", [shard.url for shard in shards], self.counts, extensions)
        self._tables: dict[int, np.ndarray] = {}
        """Of the samples of a shard that have a wanted member, as `SharedTables.rows`; keys and labels stay on disk."""
        self._open: OrderedDict[int, tuple[BinaryIO, BinaryIO]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_open": OrderedDict()}

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [shard.count for shard in self.shards]

    @property
    def remote_bytes(self) -> int:
        """Bytes of all shards that go through the cache."""
        return sum(shard.header.bytes for shard in self.shards if shard.remote)

    def where(self, i: int) -> tuple[str, str]:
        """Shard and key of sample `i`.

        Raises:
            ShardError, SampleError: see `read`.
        """
        number, entry = self._entry(i)
        return self._names[number], entry.key

    def expect(self, numbers: Sequence[int]) -> None:
        """Tells the system which samples are read soon, so that a disk fetches them all at once and in the background.

        Shards that are not on this machine yet are passed over.

        Raises:
            ShardError: see `read`.
        """
        for i in numbers if HINTS else ():
            number = bisect_right(self._ends, i)
            if self.shards[number].remote and number not in self._open:
                continue
            tar, offset, size = self._span(i)
            os.posix_fadvise(tar.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def data(self, i: int) -> bytes:
        """The wanted member of sample `i`, alone: what training reads.

        Raises:
            SampleError, ShardError: see `read`.
        """
        return self._read_at(i, *self._span(i))

    def read(self, i: int) -> Sample:
        """Sample `i` of 0 to len - 1, with its small members.

        Raises:
            SampleError: this sample cannot be read; others can.
            ShardError: its shard cannot be had, or its index is not its own.
        """
        number, entry = self._entry(i)
        tar = self._opened(number)[0]
        members = entry.members.items()
        small = {name: self._read_at(i, tar, *at) for name, at in members if name in META and at[1] <= LARGEST_META}
        extension = self.wanted(entry.members)
        assert extension is not None
        return Sample(self._names[number], entry.key, self.data(i), extension, small)

    def members(self, i: int, *, besides: Container[str]) -> tuple[str, list[str], dict[str, bytes]]:
        """Key of sample `i`, the extensions of all its members, and the content of those that are not in `besides`.

        Raises:
            SampleError, ShardError: see `read`.
        """
        number, entry = self._entry(i)
        tar = self._opened(number)[0]
        content = {name: self._read_at(i, tar, *at) for name, at in entry.members.items() if name not in besides}
        return entry.key, list(entry.members), content

    def wanted(self, names: Collection[str]) -> str | None:
        """The member wanted most of those named; where nothing is wanted, the first that is no label."""
        if not self.extensions:
            return next((found for found in names if found not in META), None)
        return next((wanted for wanted in self.extensions if wanted in names), None)

    def prefetch(self, number: int) -> None:
        """Brings a remote shard into the cache unless it is there or another process is at it.

        Raises:
            ShardError: it cannot be had.
        """
        shard = self.shards[number]
        if shard.remote and number not in self._open:
            self.cache.fetch(shard.url, shard.header, wait=False)

    def _at(self, i: int) -> tuple[int, int]:
        """Shard of a sample and the sample's number among those that count."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = bisect_right(self._ends, i)
        return number, i - (self._ends[number] - self.shards[number].count)

    def _span(self, i: int) -> tuple[BinaryIO, int, int]:
        """The tar of a sample; offset and size in bytes of its wanted member."""
        number, within = self._at(i)
        tar = self._opened(number)[0]
        offset, size = self._tables[number][within, 2:].tolist()
        return tar, offset, size

    def _entry(self, i: int) -> tuple[int, index.Entry]:
        number, within = self._at(i)
        lines_file = self._opened(number)[1]
        begin, end = self._tables[number][within, :2].tolist()
        try:
            (entry,) = index.parse_entries(os.pread(lines_file.fileno(), end - begin, begin))
        except (ValueError, KeyError, TypeError, IndexError):
            raise self._bad_index(number, f"line at offset {begin} is damaged") from None
        return number, entry

    def _opened(self, number: int) -> tuple[BinaryIO, BinaryIO]:
        opened = self._open.get(number)
        if opened is None:
            opened = self._open_files(number)
            if number not in self._tables:
                self._tables[number] = self._table(number, *opened)
            self._open[number] = opened
            if len(self._open) > SHARDS_OPEN:
                for file in self._open.popitem(last=False)[1]:
                    file.close()
        else:
            self._open.move_to_end(number)
        return opened

    def _open_files(self, number: int) -> tuple[BinaryIO, BinaryIO]:
        shard = self.shards[number]
        for attempt in range(3):  # another process may evict it between fetching and opening
            path = self.cache.fetch(shard.url, shard.header) if shard.remote else Path(shard.url)
            assert path is not None
            try:
                return path.open("rb", buffering=0), shard.index_path.open("rb", buffering=0)
            except OSError as error:
                if not shard.remote or attempt == 2:
                    fix = "it was there when the run began; put it back and start again"
                    raise ShardError(f"{error.filename}: {error.strerror}; {fix}") from None
        raise AssertionError("unreachable")

    def _table(self, number: int, tar: BinaryIO, lines_file: BinaryIO) -> np.ndarray:
        about = os.fstat(lines_file.fileno())
        stamp = (about.st_mtime_ns, about.st_size)
        rows = self._shared.rows(number, stamp)
        if rows is None:
            rows = self._shared.put(number, stamp, self._read_table(number, tar, lines_file))
        elif len(rows):
            self._check_ends(number, tar, rows[[0, -1], 2:].tolist())
        return rows

    def _read_table(self, number: int, tar: BinaryIO, lines_file: BinaryIO) -> np.ndarray:
        shard, content = self.shards[number], lines_file.read()
        ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        if len(ends) != shard.header.samples + 1:
            raise self._bad_index(number, f"{len(ends) - 1} lines for {shard.header.samples} samples")
        try:
            entries = index.parse_entries(content[ends[0] :])
            found = [(entry, self.wanted(entry.members)) for entry in entries]
        except (ValueError, KeyError, TypeError, IndexError):
            raise self._bad_index(number, "a line is damaged") from None
        kept = [wanted is not None for _, wanted in found]
        spans = [entry.members[wanted] for entry, wanted in found if wanted is not None]
        if len(kept) != shard.header.samples or len(spans) != shard.count:
            raise self._bad_index(number, f"{len(spans)} samples, expected {shard.count}")
        if entries:
            self._check_ends(number, tar, [*entries[0].members.values(), *entries[-1].members.values()])
        lines = np.stack([ends[:-1] + 1, ends[1:]], axis=1)[kept]
        return np.concatenate([lines, np.array(spans, dtype=np.int64).reshape(-1, 2)], axis=1)

    def _check_ends(self, number: int, tar: BinaryIO, members: Sequence[tuple[int, int]]) -> None:
        """An index of the right size may still be another tar's: the tar headers of members at its ends tell.

        members: offset and size in bytes.
        """
        try:
            for offset, size in members:
                block = os.pread(tar.fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
                if tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size != size:
                    raise ValueError
        except (ValueError, OSError, tarfile.TarError):
            raise self._bad_index(number, "it does not fit the tar") from None

    def _read_at(self, i: int, tar: BinaryIO, offset: int, size: int) -> bytes:
        try:
            data = os.pread(tar.fileno(), size, offset)
            fault = f"{len(data)} bytes, expected {size}; the shard was cut" if len(data) != size else None
        except OSError as error:
            fault = error.strerror
        if fault is not None:
            name, key = self.where(i)
            raise SampleError(f"{name}: sample '{key}' at offset {offset}: {fault}")
        return data

    def _bad_index(self, number: int, fault: str) -> ShardError:
        path = self.shards[number].index_path
        return ShardError(f"{path}: {fault}; delete it, and it is built again from {shown(self.shards[number].url)}")
