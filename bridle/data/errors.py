"""How the data room refuses."""

from __future__ import annotations

from bridle.errors import MistakeError
from bridle.settings import RecipeError


class ShardError(MistakeError):
    """A shard, a list of shards or a source that cannot be used; names the file, what was found and what to do."""


class SampleError(ShardError):
    """One sample that cannot be read while its neighbours can."""


class UnavailableError(ShardError, RecipeError):
    """The other side answers, and will not give the file: not there, not ours to read, no such request.

    Another try would find the same, so the exit code is that of a wrong argument.
    """
