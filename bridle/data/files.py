"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bridle.data.errors import ShardError

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file size limit"}
"""Error numbers that mean there is no room."""


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well, and is removed when it does not.

    Raises:
        ShardError: no room on the disk.
        OSError: any other fault of the file system.
    """
    handle, aside = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        Path(aside).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        if error.errno in FULL:
            raise no_room(path, error) from None
        raise
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def no_room(path: Path, error: OSError) -> ShardError:
    """The one line for a full disk."""
    reason = FULL.get(error.errno or 0, str(error))
    return ShardError(
        f"{path}: could not be written: {reason}; free space in {path.parent} and run the same command again"
    )


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
