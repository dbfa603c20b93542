"""Fetching one remote shard: from a URL, or the output of a command. Nothing here knows what is fetched."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridle.data.errors import ShardError, UnavailableError
from bridle.remote import access

CHUNK = 1 << 20
PIPE = "pipe:"
PIPE_STALL_SECONDS = 600.0


def download(url: str, file: Path, limit: int) -> int:
    """Writes a whole remote file to `file`, with several tries; returns its bytes.

    Args:
        url: https://, s3:// and what else `bridle.remote` knows; or pipe:COMMAND.
        limit: bytes above which it is refused.

    Raises:
        UnavailableError: not found, or not allowed.
        ShardError: anything else, after some tries where another try could help.
        OSError: `file` cannot be written.
    """
    name = access.shown(url)
    try:
        with _as_shard_errors():
            return _from_pipe(url, name, file, limit) if url.startswith(PIPE) else access.fetch(url, file, limit)
    except access.TooLargeError as error:
        fix = "raise data.cache_gb or build smaller shards"
        raise ShardError(f"{name}: {error.found} do not fit the cache of {limit / 1e9:g} GB; {fix}") from None


def size_of(url: str) -> int | None:
    """Bytes of a remote file, without fetching it; none where that cannot be known (pipe:, some servers).

    Raises:
        UnavailableError, ShardError: see `download`.
    """
    with _as_shard_errors():
        return None if url.startswith(PIPE) else access.size_of(url)


def search(pattern: str) -> list[str]:
    """URLs of all files of a store that match a glob, sorted; ``*`` passes ``/`` too.

    Raises:
        UnavailableError, ShardError: see `download`.
    """
    with _as_shard_errors():
        return access.search(pattern)


@contextmanager
def _as_shard_errors() -> Iterator[None]:
    try:
        yield
    except access.RefusedError as error:
        raise UnavailableError(str(error)) from None
    except access.OutOfReachError as error:
        raise ShardError(str(error)) from None


def _from_pipe(url: str, name: str, file: Path, limit: int) -> int:
    received = 0
    with file.open("wb") as stream, _output(url.removeprefix(PIPE), name) as chunks:
        for chunk in chunks:
            received += len(chunk)
            if received > limit:
                raise access.TooLargeError(f"more than {limit} bytes")
            stream.write(chunk)
    return received


@contextmanager
def _output(command: str, name: str) -> Iterator[Iterator[bytes]]:
    """What a command writes, in chunks; its end is looked at when the block ends."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(  # the user's own command, as the pattern says
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            yield _chunks(process, name)
            code = process.wait(PIPE_STALL_SECONDS)
        except subprocess.TimeoutExpired:
            raise ShardError(f"{name}: closed its output but did not end in {PIPE_STALL_SECONDS:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout:
                process.stdout.close()
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
    if code:
        raise ShardError(
            f"{name}: the command ended with exit code {code}: {''.join(last) or 'it said nothing'}; run it by hand"
        )


def _chunks(process: subprocess.Popen[bytes], name: str) -> Iterator[bytes]:
    assert process.stdout is not None
    handle = process.stdout.fileno()
    while True:
        if not select.select([handle], [], [], PIPE_STALL_SECONDS)[0]:
            raise ShardError(f"{name}: the command has written nothing for {PIPE_STALL_SECONDS:g} s; run it by hand")
        chunk = os.read(handle, CHUNK)
        if not chunk:
            return
        yield chunk
