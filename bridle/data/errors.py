"""How the data room refuses."""

from __future__ import annotations


class ShardError(ValueError):
    """A shard, a list of shards or a source that cannot be used; names the file, what was found and what to do."""


class SampleError(ShardError):
    """One sample that cannot be read while its neighbours can."""
