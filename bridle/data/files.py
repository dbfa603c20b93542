"""Writing shards and their indexes."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bridle.data.errors import ShardError
from bridle.files import whole_file

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file size limit"}
"""Error numbers that mean there is no room."""


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well, and is removed when it does not.

    Raises:
        ShardError: no room on the disk.
        OSError: any other fault of the file system.
    """
    try:
        with whole_file(path) as aside, aside.open("w+b") as stream:
            yield stream
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise no_room(path, cause) from None
        raise


def no_room(path: Path, error: OSError) -> ShardError:
    """The one line for a full disk."""
    reason = FULL.get(error.errno or 0, str(error))
    return ShardError(
        f"{path}: could not be written: {reason}; free space in {path.parent} and run the same command again"
    )
