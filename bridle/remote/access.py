"""Files by URL, through fsspec: ``s3://``, ``gs://``, ``az://``, ``hf://``, ``https://`` and what else it knows.

The only place that opens such a file system, tries again, and tells what cannot be had from what is out of reach.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from bridle.settings import RecipeError, nearest

log = logging.getLogger("bridle")
T = TypeVar("T")
TRIES = 5
FIRST_WAIT_SECONDS = 0.5
"""Doubled after each try."""
CONNECT_SECONDS, SILENT_SECONDS = 10, 60
"""To connect, and without a byte."""
EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "hf": "hf"}
"""What ``pip install 'bridle[EXTRA]'`` brings for a scheme."""
WEB = ("http", "https")
BUCKETS = ("s3", "gs", "gcs", "az", "abfs")
GLOB = set("*?[")
TRANSIENT = {408, 425, 429}
S3_BUSY = {"SlowDown", "Throttling", "RequestTimeout"}
"""Codes of S3 that come with the status of a refusal and are none."""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
OURS = (TypeError, AttributeError, NameError, AssertionError, MemoryError)


class RefusedError(RecipeError):
    """The other side answers and will not: not there, not ours, no credentials; or nothing installed knows it.

    Another try would find the same.
    """


class OutOfReachError(OSError):
    """It does not answer, breaks off or fails, at every one of `TRIES` tries: the network most likely."""


class TooLargeError(ValueError):
    """More bytes than were allowed; `found` says how many."""

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found


def is_url(text: str) -> bool:
    """Whether this is a place behind a scheme, and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def shown(url: str) -> str:
    """A URL for messages and logs: without password and query, which may hold a signature."""
    if "://" not in url or url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def unknown_scheme(url: str) -> str | None:
    """What to say of a URL whose scheme nobody knows; none for one that is known."""
    import fsspec

    scheme = url.partition("://")[0]
    if scheme in WEB or scheme in EXTRAS or scheme in fsspec.available_protocols():
        return None
    return f"unknown kind '{scheme}://'{nearest(f'{scheme}://', [f'{known}://' for known in (*EXTRAS, *WEB)])}"


def size_of(url: str) -> int | None:
    """Bytes of a file, without fetching it; none where that is not told.

    Raises:
        RefusedError, OutOfReachError
    """

    def once() -> int | None:
        fs, path = file_system(url)
        size = fs.info(path).get("size")
        return None if size is None else int(size)

    return tried(url, once)


def fetch(url: str, file: Path, limit: int) -> int:
    """Writes a whole file to `file`, from its beginning at each try; returns its bytes.

    Raises:
        RefusedError, OutOfReachError
        TooLargeError: it has more bytes than `limit`.
        OSError: `file` cannot be written.
    """
    from fsspec.callbacks import Callback

    class Bound(Callback):  # type: ignore[misc]
        """Ends a transfer that passes the limit; fsspec calls it with what it knows and receives."""

        def set_size(self, size: int | None) -> None:
            super().set_size(size)
            if (size or 0) > limit:
                raise TooLargeError(f"{size} bytes")

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > limit:
                raise TooLargeError(f"more than {limit} bytes")

    def once() -> int:
        fs, path = file_system(url)
        transfer = Bound()
        fs.get_file(path, str(file), callback=transfer)
        received = file.stat().st_size
        if transfer.size is not None and received != transfer.size:
            raise OutOfReachError(f"the connection ended after {received} of {transfer.size} bytes")
        return received

    return tried(url, once)


def search(pattern: str) -> list[str]:
    """URLs of all files that match a glob, sorted; ``*`` passes ``/`` too.

    Raises:
        RefusedError, OutOfReachError
    """
    scheme, _, rest = pattern.partition("://")
    fixed = re.split(r"[*?\[]", rest, maxsplit=1)[0]
    folder, _, prefix = fixed.rpartition("/")

    def once() -> list[str]:
        fs, path = file_system(f"{scheme}://{folder}")
        root = path.rstrip("/")
        narrowed = {"prefix": prefix} if scheme in BUCKETS else {}  # which saves lists of what is not asked for
        found = [name.removeprefix(root).lstrip("/") for name in fs.find(path, **narrowed)]
        names = [f"{folder}/{name}" for name in found]
        return sorted(f"{scheme}://{name}" for name in names if fnmatch.fnmatchcase(name, rest))

    return tried(pattern, once)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, with nothing of it remembered, and what it calls the file there.

    Ask again in each process and thread: fsspec keeps what may be kept.

    Raises:
        RefusedError: nothing installed knows this scheme, or it cannot read the rest.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        if scheme in WEB:  # the URL as it stands: "::" in it is no chain of file systems
            return fsspec.filesystem(scheme, client_kwargs=_web_client()), url
        options = {}
        if scheme == "s3":
            _forget_s3_of_another(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
            options = {"config_kwargs": _s3_client()}
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        fix = f"install it with: pip install 'bridle[{extra}]'" if extra else "install what fsspec needs for it"
        raise RefusedError(f"{shown(url)}: {scheme}:// needs a library ({_said(error, url)}); {fix}") from None
    except ValueError as error:
        raise RefusedError(f"{shown(url)}: {_said(error, url)}") from None
    fs.invalidate_cache()  # some keep lists whatever they are told
    if scheme == "s3":
        fs.retries = 1  # `tried` does that, and says so
    return fs, path


def _web_client() -> dict[str, Any]:
    import aiohttp

    return {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
        "trust_env": True,  # proxies and .netrc
        "headers": {"Accept-Encoding": "identity"},  # else the size told is not the size received
    }


@functools.lru_cache(maxsize=1)
def _forget_s3_of_another(environment: frozenset[tuple[str, str]]) -> None:
    """Called with the same settings as before, does nothing. fsspec keeps a connection made with others for good."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def _s3_client() -> dict[str, Any]:
    return {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS, "retries": {"max_attempts": 1}}


def tried(url: str, once: Callable[[], T]) -> T:
    """Runs `once`, again where another try may help; its errors name `url`.

    Raises:
        RefusedError: another try cannot help.
        OutOfReachError: none of `TRIES` did.
        TooLargeError, OSError: `once` says so, of its own files.
    """
    for attempt in range(TRIES):
        try:
            return once()
        except (RefusedError, TooLargeError, *OURS):
            raise
        except Exception as error:  # each library has a dozen kinds
            if _is_of_this_disk(error):
                raise
            if (refusal := _refusal(error, url)) is not None:
                raise RefusedError(f"{shown(url)}: {refusal}") from None
            said = _answer(error)[1] or _said(error, url)
        if attempt < TRIES - 1:
            wait = FIRST_WAIT_SECONDS * 2**attempt
            log.warning("%s: %s; trying again in %.1f s", shown(url), said, wait)
            time.sleep(wait)
    raise OutOfReachError(f"{shown(url)}: {TRIES} tries failed, the last: {said}; check the network and run again")


def _is_of_this_disk(error: Exception) -> bool:
    """Whether a copy failed at our end of it."""
    if not isinstance(error, OSError) or isinstance(error, (TimeoutError, ConnectionError)):
        return False
    return error.errno in DISK or str(error.filename or "").startswith("/")


def _refusal(error: Exception, url: str) -> str | None:
    """What a refusal says, and what to do; none for a fault that may pass."""
    scheme = url.partition("://")[0]
    status, words = _answer(error)
    said = words or _said(error, url)
    if status is not None and (status >= 500 or status in TRANSIENT):
        return None
    if "Credential" in type(error).__name__:
        if scheme != "s3":
            return f"no credentials found ({said}); log in as {scheme}:// wants it"
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, or a role"
        return f"no S3 credentials found ({said}); {fix}"
    if scheme in WEB:
        said = f"the server answers {said if words else '404 Not Found'}"
    if status in {401, 403} or isinstance(error, PermissionError):
        rights = "that this machine may read it" if scheme in WEB else "the credentials and the bucket's policy"
        return f"{said}; check {rights}"
    if isinstance(error, FileNotFoundError):
        if scheme in WEB and status is None and error.__cause__ is not None:  # fsspec calls a lost connection so, too
            return None
        if scheme in WEB:
            return f"{said}; check the address"
        place = "bucket, prefix or key, and AWS_ENDPOINT_URL" if scheme == "s3" else "the address"
        return f"not found ({said}); check {place}"
    if status is not None or isinstance(error, ValueError):
        return f"{said}; check the address{' and the AWS settings' if scheme == 's3' else ''}"
    return None


def _answer(error: Exception) -> tuple[int | None, str]:
    """Status and words of an answer, wherever its library keeps them; none and empty where there was no answer."""
    causes = [error.__cause__] if isinstance(error, OSError) else []  # a lost connection's is what was not received
    for found in (error, *causes):
        response = getattr(found, "response", None)
        if isinstance(response, dict):  # S3's
            about = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            busy = about.get("Code") in S3_BUSY
            return 503 if busy else status, f"S3 answers {about.get('Code')} ({about.get('Message')})"
        places = ((found, "status"), (found, "status_code"), (response, "status_code"), (found, "code"))
        status = next((at for owner, name in places if isinstance(at := getattr(owner, name, None), int)), None)
        if status:
            words = f"{status} {getattr(found, 'message', '') or getattr(found, 'reason', '')}"
            return status, " ".join(words.split())[:200]
    return None, ""


def _said(error: BaseException, url: str) -> str:
    """One line without secrets, which libraries leave in the URLs that they name."""
    text = " ".join(str(error).replace(url, shown(url)).split())
    text = re.sub(r"(://)[^/@\s'\"]*@", r"\1", text)
    return re.sub(r"(://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)[:200] or type(error).__name__
