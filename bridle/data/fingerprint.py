"""What a set of shards is, in a few words: so that a run notices when it is no longer what it was begun with."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bridle.data.shards import Shard, ShardSet

NAMED = 3
READ_AT_ONCE = 16


def fingerprint(shards: ShardSet) -> dict[str, Any]:
    """Plain data: of each shard, in order, its name without a place, its samples, the hash of its index's lines, and
    the tar's own hash where its index has one; of each source, how many shards it has and their weight.

    Where shards lie does not enter, so they may be moved. The index's lines are keys, offsets and sizes; content that
    is replaced byte for byte at the same sizes shows only where the index has the tar's hash.

    Raises:
        OSError: an index has gone.
    """
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        prints = list(pool.map(shard_print, shards.shards))
    sources = [[source.shards, str(source.weight)] for source in shards.sources]
    return {"sources": sources, "shards": prints}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, what is not as it was; empty where all is."""
    return "; ".join(_differences(before, now))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    then, here = _by_name(before["shards"]), _by_name(now["shards"])
    for what, found in (("gone", then.keys() - here.keys()), ("new", here.keys() - then.keys())):
        if found:
            yield _named(sorted({name for name, _ in found}), what)
    changed = [name for name, number in here if (name, number) in then
               and not same(then[name, number], here[name, number])]  # fmt: skip
    if changed:
        yield _named(changed, "changed in content")
    if not changed and then.keys() == here.keys():
        if list(then) != list(here):
            yield "the shards stand in another order"
        elif before["sources"] != now["sources"]:
            yield "the sources have other weights or shares of the shards"


def _by_name(shards: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Prints by their names and numbers: those of two folders often have the same names."""
    seen: Counter[str] = Counter()
    found = {}
    for shard in shards:
        found[shard["name"], seen[shard["name"]]] = shard
        seen[shard["name"]] += 1
    return found


def same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two prints of a shard are of the same content, whatever its name."""
    hashes = {shard["sha256"] for shard in (before, now)} - {None}
    return len(hashes) < 2 and (before["samples"], before["index"]) == (now["samples"], now["index"])


def _named(names: list[str], what: str) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{what}: {', '.join(names[:NAMED])}{more}"


def shard_print(shard: Shard) -> dict[str, Any]:
    """What `fingerprint` says of one shard."""
    digest = hashlib.sha256()
    with shard.index_path.open("rb") as lines:
        lines.readline()  # says whether the tar was hashed, which may come later
        while block := lines.read(1 << 20):
            digest.update(block)
    name = shard.url if shard.url.startswith("pipe:") else Path(urlsplit(shard.url).path).name
    return {
        "name": name,
        "samples": shard.count,
        "index": digest.hexdigest()[:32],
        "sha256": shard.header.sha256,
    }
