"""Writing shards with WebDataset's writer: plain tars whose bytes depend on nothing but their content."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridle.data import index
from bridle.data.errors import ShardError
from bridle.data.files import written_aside


@dataclass(frozen=True, slots=True)
class Planned:
    """A sample to write: key, media file, that file's extension in the shard and size in bytes, KEY.json's content.

    group: samples of one group, such as clips of one recording, are held out together or not at all; empty: on its own.
    """

    key: str
    source: Path
    extension: str
    size: int
    meta: dict[str, Any] = field(default_factory=dict)
    group: str = ""

    @property
    def json(self) -> bytes:
        """KEY.json's content: UTF-8, keys sorted."""
        return json.dumps(self.meta, sort_keys=True, ensure_ascii=False).encode(errors="surrogateescape")

    @property
    def tar_bytes(self) -> int:
        """What the sample takes in a tar, long names aside."""
        return sum(_blocks(size) + tarfile.BLOCKSIZE for size in (self.size, len(self.json)))


def write_shard(path: Path, samples: Sequence[Planned]) -> tuple[index.Header, list[str]]:
    """Writes one tar and its index; the same samples give the same bytes. Neither file is ever seen half written.

    Returns:
        The index's header, and the files that could not be read (any more), which are left out.

    Raises:
        ShardError: no room on the disk, no file of the shard can be read, or two samples of one key.
    """
    from webdataset import TarWriter  # brings torch, which planning and finished shards can do without

    unreadable = []
    with (
        written_aside(path) as stream,
        TarWriter(stream, encoder=False, mode=0o644, mtime=0, user="", group="") as tar,
    ):
        for sample in samples:
            try:
                content = sample.source.read_bytes()
            except OSError as error:
                unreadable.append(str(sample.source))
                if len(unreadable) == len(samples):  # a disk that went away is no list of bad files
                    fault = f"{sample.source}: {error.strerror}, and so are all {len(samples)} files of {path.name}"
                    raise ShardError(f"{fault}; check the disk, and run the same command again") from None
                continue
            tar.write({"__key__": sample.key, sample.extension: content, "json": sample.json})
    return write_index(path), unreadable


def write_index(path: Path, where: Path | None = None) -> index.Header:
    """Indexes and hashes a tar; the index goes beside it, or to `where`.

    Raises:
        ShardError: see `index.scan`; no room on the disk.
    """
    written = path.stat().st_mtime_ns
    header, entries = index.scan(path, hashed=True)
    index.write(where or path.with_name(path.name + index.SUFFIX), header, entries, written)
    return header


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
