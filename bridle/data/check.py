"""Reading every byte of shards to find what is wrong with them before a run does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridle.data import index
from bridle.data.errors import SampleError, ShardError
from bridle.data.shards import ShardSet, open_shards, unused
from bridle.modalities.clip import ClipError
from bridle.remote.access import shown

Decode = Callable[[bytes], object]
"""Turns a sample's bytes into anything; its ClipError means a bad sample."""

Progress = Callable[[int, int], None]
"""Called with the samples of a shard that are done, and with all it has."""


@dataclass
class Checked:
    """One shard: samples that count, samples without a wanted member, bytes, and one line for each fault."""

    url: str
    samples: int = 0
    without: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)


def check_shard(
    url: str,
    *,
    extensions: Sequence[str],
    decode: Decode | None,
    cache: str | None = None,
    cache_gb: float = 50.0,
    progress: Progress = lambda done, of: None,
) -> Checked:
    """Checks one shard: the tar from end to end, its index, its hash, and with `decode` every sample."""
    checked = Checked(shown(url))
    try:
        shards = open_shards([url], extensions=extensions, cache=cache, cache_gb=cache_gb)
        _check_tar(shards, checked)
    except ShardError as error:
        checked.faults.append(str(error))
        return checked
    if (fault := unused(shards.shards[0], extensions)) is not None:
        checked.faults.append(fault)
    for i in range(len(shards)):
        progress(i, len(shards))
        try:
            sample = shards.read(i)
            _ = sample.about  # parses it
            if decode is not None:
                decode(sample.data)
        except SampleError as error:
            checked.faults.append(str(error))
        except ShardError as error:
            checked.faults.append(str(error))
            break
        except ClipError as error:
            checked.faults.append(f"{checked.url}: sample '{sample.key}' ({sample.extension}): {error}")
    return checked


def _check_tar(shards: ShardSet, checked: Checked) -> None:
    shard = shards.shards[0]
    path = shards.cache.fetch(shard.url, shard.header) if shard.remote else Path(shard.url)
    assert path is not None
    found, entries = index.scan(path, hashed=True)
    stored, stored_entries = index.read(shard.index_path)
    checked.samples, checked.bytes, checked.without = shard.count, found.bytes, found.samples - shard.count
    if entries != stored_entries:
        fix = "delete it, and it is built again"
        checked.faults.append(f"{shard.index_path}: does not fit the tar {checked.url}; {fix}")
    if stored.sha256 not in {None, found.sha256}:
        fault = f"sha256 {found.sha256}, but its index says {stored.sha256}"
        checked.faults.append(f"{checked.url}: {fault}; the content has changed: copy or build the shard again")
