"""Fetching one remote shard: http(s), S3, or the output of a command. Nothing here knows what is fetched."""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import requests

from bridle.data.errors import ShardError, UnavailableError

log = logging.getLogger(__name__)
TRIES = 5
FIRST_WAIT_SECONDS = 0.5
"""Doubled after each try."""
CHUNK = 1 << 20
HTTP_TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and without a byte."""
PIPE_STALL_SECONDS = 600.0
S3_GONE = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
S3_BUSY = {"SlowDown", "Throttling", "RequestTimeout"}
S3_FORBIDDEN = {"403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


class _TransientError(Exception):
    """Worth another try."""


def download(url: str, name: str, stream: BinaryIO, limit: int) -> int:
    """Writes a whole remote file to an open, seekable file, with several tries; returns its bytes.

    Args:
        url: http://, https://, s3:// or pipe:.
        name: what messages call it (no secrets).
        limit: bytes above which it is refused.

    Raises:
        UnavailableError: not found, or not allowed.
        ShardError: anything else, after `TRIES` tries where another try could help.
    """

    def once() -> int:
        stream.seek(0)
        stream.truncate()
        with _opened(url, name) as (size, chunks):
            return _copy(chunks, size, stream, name, limit)

    return _retried(once, name)


def size_of(url: str, name: str) -> int | None:
    """Bytes of a remote file, without fetching it; none where that cannot be known (pipe:, some servers).

    Raises:
        UnavailableError, ShardError: see `download`.
    """
    if url.startswith("pipe:"):
        return None

    def once() -> int | None:
        with _opened(url, name) as (size, _):
            return size

    return _retried(once, name)


def list_s3(pattern: str) -> list[str]:
    """Keys of a bucket that match ``s3://bucket/glob``, sorted.

    Raises:
        ShardError
    """
    bucket, key = _bucket_and_key(pattern)
    prefix = key[: min(key.find(mark) for mark in "*?[" if mark in key)]

    def once() -> list[str]:
        with _s3_errors(pattern):
            pages = _s3(os.getpid()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            names = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return sorted(f"s3://{bucket}/{name}" for name in names if fnmatch.fnmatchcase(name, key))

    return _retried(once, pattern)


def _retried(once: Any, name: str) -> Any:
    for attempt in range(TRIES):
        try:
            return once()
        except _TransientError as error:
            if attempt == TRIES - 1:
                raise ShardError(
                    f"{name}: {TRIES} tries failed, the last: {error}; check the network and run again"
                ) from None
            wait = FIRST_WAIT_SECONDS * 2**attempt
            log.warning("%s: %s; trying again in %.1f s", name, error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _copy(chunks: Iterator[bytes], size: int | None, stream: BinaryIO, name: str, limit: int) -> int:
    if (size or 0) > limit:
        raise _too_large(name, f"{size} bytes", limit)
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if received > limit:
            raise _too_large(name, f"more than {limit} bytes", limit)
        stream.write(chunk)
    if size is not None and received != size:
        raise _TransientError(f"the connection ended after {received} of {size} bytes")
    return received


def _too_large(name: str, found: str, limit: int) -> ShardError:
    return ShardError(
        f"{name}: {found} do not fit the cache of {limit / 1e9:g} GB; raise data.cache_gb or build smaller shards"
    )


@contextmanager
def _opened(url: str, name: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
    """Size, where the other side tells it, and the content in chunks."""
    opener = _open_pipe if url.startswith("pipe:") else _open_s3 if url.startswith("s3://") else _open_http
    with opener(url, name) as opened:
        yield opened


@contextmanager
def _open_http(url: str, name: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
    headers = {"Accept-Encoding": "identity"}  # else the size told is not the size received
    try:
        with requests.get(url, stream=True, timeout=HTTP_TIMEOUT, headers=headers) as answer:
            status = f"{answer.status_code} {answer.reason}"
            if answer.status_code in {408, 425, 429} or answer.status_code >= 500:
                raise _TransientError(f"the server answers {status}")
            if answer.status_code in {401, 403}:
                raise UnavailableError(f"{name}: the server answers {status}; check that this machine may read it")
            if 400 <= answer.status_code < 500:
                raise UnavailableError(f"{name}: the server answers {status}; check the address")
            if answer.status_code != 200:
                raise ShardError(f"{name}: the server answers {status}, expected 200; check the address")
            length = answer.headers.get("Content-Length", "")
            yield int(length) if length.isdigit() else None, answer.iter_content(CHUNK)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _TransientError(_plain(error)) from None
    except requests.RequestException as error:
        raise ShardError(f"{name}: {_plain(error)}; check the address") from None


@contextmanager
def _open_s3(url: str, name: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
    bucket, key = _bucket_and_key(url)
    with _s3_errors(name):
        found = _s3(os.getpid()).get_object(Bucket=bucket, Key=key)
        try:
            yield found["ContentLength"], found["Body"].iter_chunks(CHUNK)
        finally:
            found["Body"].close()


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise ShardError(f"shards '{url}': expected s3://BUCKET/KEY.tar")
    return bucket, key


@functools.lru_cache(maxsize=1)
def _s3(process: int) -> Any:
    """A client for each process, since connections do not survive a fork."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ShardError("s3:// needs boto3; install it with: pip install 'bridle[s3]'") from None
    return boto3.client(
        "s3", config=Config(connect_timeout=HTTP_TIMEOUT[0], read_timeout=HTTP_TIMEOUT[1], retries={"max_attempts": 1})
    )


@contextmanager
def _s3_errors(name: str) -> Iterator[None]:
    _s3(os.getpid())  # says so when boto3 is missing
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        answer = error.response.get("Error", {})
        code, said = str(answer.get("Code", "?")), f"{answer.get('Code')} ({answer.get('Message')})"
        if code in S3_GONE:
            raise UnavailableError(f"{name}: S3 answers {said}; check bucket, key and AWS_ENDPOINT_URL") from None
        if code in S3_FORBIDDEN:
            raise UnavailableError(
                f"{name}: S3 answers {said}; check the credentials and the bucket's policy"
            ) from None
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        if status >= 500 or code in S3_BUSY:
            raise _TransientError(f"S3 answers {said}") from None
        if status >= 400:
            raise UnavailableError(f"{name}: S3 answers {said}; check the address and the AWS settings") from None
        raise ShardError(f"{name}: S3 answers {said}") from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        raise UnavailableError(f"{name}: no S3 credentials found; {fix}") from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise _TransientError(_plain(error)) from None
    except exceptions.IncompleteReadError as error:
        raise _TransientError(f"the connection ended early: {error}") from None
    except exceptions.BotoCoreError as error:
        raise ShardError(f"{name}: {_plain(error)}; check the address and the AWS settings") from None


@contextmanager
def _open_pipe(url: str, name: str) -> Iterator[tuple[None, Iterator[bytes]]]:
    command = url.removeprefix("pipe:")
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
            yield None, _pipe_chunks(process, name)
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


def _pipe_chunks(process: subprocess.Popen[bytes], name: str) -> Iterator[bytes]:
    assert process.stdout is not None
    handle = process.stdout.fileno()
    while True:
        if not select.select([handle], [], [], PIPE_STALL_SECONDS)[0]:
            raise ShardError(f"{name}: the command has written nothing for {PIPE_STALL_SECONDS:g} s; run it by hand")
        chunk = os.read(handle, CHUNK)
        if not chunk:
            return
        yield chunk


def _plain(error: Exception) -> str:
    """One line without addresses of objects or of pools."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return " ".join(str(reason or error).split()).rpartition(">: ")[2][:200]
