"""What opening a set of shards found, in one file: so that one process of a machine asks for every index, and the
others read what it found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from bridle.data.cache import ShardCache
from bridle.data.errors import ShardError
from bridle.data.index import Header
from bridle.data.order import Source
from bridle.data.shards import Shard, ShardSet
from bridle.files import read_json, whole_file

FORMAT = 1


def listing_path(cache: ShardCache, sources: Sequence[tuple[Sequence[str], float]], extensions: Sequence[str]) -> Path:
    """Where the listing of such a mixture (see `open_mixture`) stands in the cache.

    Relative patterns are of the working folder, and runs in other folders may begin at the same moment.
    """
    named = json.dumps(
        [FORMAT, str(Path.cwd()), [[list(patterns), weight] for patterns, weight in sources], list(extensions)]
    )
    return cache.folder / "listings" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"


def write_listing(shards: ShardSet, path: Path) -> None:
    """Writes it, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    listed = [
        [shard.url, str(shard.index_path), shard.count, dataclasses.asdict(shard.header)] for shard in shards.shards
    ]
    sources = [[source.shards, str(source.weight)] for source in shards.sources]
    content = {"format": FORMAT, "extensions": list(shards.extensions), "sources": sources, "shards": listed}
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def read_listing(path: Path, cache: ShardCache) -> ShardSet:
    """The set of shards that `write_listing` was given.

    Raises:
        ShardError: no listing, or a damaged one.
    """
    try:
        found: dict[str, Any] = read_json(path)
        shards = [
            Shard(url, Header(**header), Path(index_path), count) for url, index_path, count, header in found["shards"]
        ]
        sources = [Source(count, Fraction(weight)) for count, weight in found["sources"]]
        return ShardSet(shards, tuple(found["extensions"]), cache, sources)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); delete it and start again") from None
