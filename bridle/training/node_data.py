"""A set of shards opened by one rank of each node; the others read what it found."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bridle.config import DataSettings, DataSource
from bridle.data.cache import ShardCache
from bridle.data.errors import ShardError
from bridle.data.listing import listing_path, read_listing, write_listing
from bridle.data.shards import ShardSet, open_mixture
from bridle.training.ranks import Ranks

log = logging.getLogger("bridle")


def open_on_node(
    sources: Sequence[DataSource], extensions: Sequence[str], data: DataSettings, ranks: Ranks
) -> ShardSet:
    """As `open_mixture`, on every rank alike; asks a disk or store once a node. All ranks must call it.

    Where one node's first rank fails, or cannot leave a listing in the cache, each rank opens the shards itself, and
    says what is wrong.

    Raises:
        ShardError: see `open_mixture`.
    """
    mixture = [(source.shards, source.weight) for source in sources]

    def opened() -> ShardSet:
        return open_mixture(mixture, extensions=extensions, cache=data.cache, cache_gb=data.cache_gb)

    if ranks.world == 1:
        return opened()
    cache = ShardCache(data.cache, data.cache_gb)
    path, found, failed = listing_path(cache, mixture, extensions), None, False
    if ranks.local == 0:
        try:
            found = opened()
            write_listing(found, path)
        except (ShardError, OSError) as error:
            log.debug("%s", error)
            failed = True
    if ranks.vote(failed).passed():
        return opened() if found is None else found
    return read_listing(path, cache) if found is None else found
