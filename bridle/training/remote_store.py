"""A place in an object store (``s3://bucket/prefix``, and what else fsspec knows), with errors that say what to do."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from bridle.settings import RecipeError

log = logging.getLogger("bridle")
T = TypeVar("T")
TRIES = 4
FIRST_WAIT_SECONDS = 1.0
"""Doubled after each try."""
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}}
INSTALL = {"s3": "s3fs (pip install 'bridle[s3]')", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_remote(run: str) -> bool:
    """Whether a run folder is in a store, and not on a disk."""
    return re.match(r"[a-z][a-z0-9+.-]*://", run) is not None


class RemoteStore:
    """Files below a URL, by their relative names. Nothing that was read or listed is remembered.

    Raises:
        RecipeError: an unknown kind of store, no such bucket, no credentials, or not ours to read or write.
        OSError: anything else, after some tries: the network most likely.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, path = url.partition("://")
        if not path.strip("/"):
            raise RecipeError(f"{url}: expected {scheme}://BUCKET/PREFIX")
        try:
            import fsspec

            self._is_s3 = scheme == "s3"
            options = S3_OPTIONS if self._is_s3 else {}
            self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError:
            raise RecipeError(f"{url}: needs {INSTALL.get(scheme, 'a file system that fsspec finds')}") from None
        except ValueError as error:
            raise RecipeError(f"{url}: {error}") from None

    def list(self) -> dict[str, str]:
        """All files, and for each what changes whenever it is written."""

        def once() -> dict[str, str]:
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
            return {name.removeprefix(f"{self.root}/"): _version(info) for name, info in found.items()}

        return self._tried("", once)

    def put(self, file: Path, name: str) -> None:
        """Uploads a file that nobody writes to, whole or not at all."""
        self._tried(name, lambda: self.fs.put_file(str(file), f"{self.root}/{name}"))

    def version(self, name: str) -> str:
        """What `list` says of a file that is there."""
        return self._tried(name, lambda: _version(self.fs.info(f"{self.root}/{name}")))

    def get(self, name: str, file: Path) -> None:
        """Downloads a file."""
        self._tried(name, lambda: self.fs.get_file(f"{self.root}/{name}", str(file)))

    def read(self, name: str) -> str | None:
        """A small file's text; none where there is none."""

        def once() -> str | None:
            try:
                return bytes(self.fs.cat_file(f"{self.root}/{name}")).decode()
            except FileNotFoundError:
                return None

        return self._tried(name, once)

    def etag(self, name: str) -> str:
        """What `write` takes as `if_match`; empty where there is no such file."""

        def once() -> str:
            try:
                return str(self.fs.info(f"{self.root}/{name}").get("ETag", ""))
            except FileNotFoundError:
                return ""

        return self._tried(name, once)

    def write(self, name: str, data: bytes, if_match: str | None = None) -> bool:
        """Writes a file; on S3 only if the one there has the ETag `if_match` (empty: if there is none), else false."""
        conditions = {None: {}, "": {"IfNoneMatch": "*"}}.get(if_match, {"IfMatch": if_match})

        def once() -> bool:
            try:
                self.fs.pipe_file(f"{self.root}/{name}", data, **(conditions if self._is_s3 else {}))
            except (FileExistsError, FileNotFoundError) as error:
                if if_match is None or "specified bucket" in str(error):
                    raise
                return False
            except OSError as error:
                if if_match is None or "condition" not in str(error).lower():
                    raise
                return False
            return True

        return self._tried(name, once)

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""

        def once() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}")

        self._tried(name, once)

    def _tried(self, name: str, once: Callable[[], T]) -> T:
        what = f"{self.url}/{name}".rstrip("/")
        for attempt in range(TRIES):
            try:
                with _clear_errors(what):
                    return once()
            except OSError as error:
                if attempt == TRIES - 1:
                    raise
                wait = FIRST_WAIT_SECONDS * 2**attempt
                log.info("%s; trying again in %.0f s", error, wait)
                time.sleep(wait)
        raise AssertionError("unreachable")


@contextlib.contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    """Whatever a store's library raises, as one line."""
    try:
        yield
    except RecipeError:
        raise
    except FileNotFoundError as error:
        raise RecipeError(f"{what}: not found ({_said(error)}); check bucket, prefix and AWS_ENDPOINT_URL") from None
    except PermissionError as error:
        raise RecipeError(f"{what}: {_said(error)}; check the credentials and the bucket's policy") from None
    except Exception as error:
        if "Credential" in type(error).__name__:
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, or a role"
            raise RecipeError(f"{what}: no credentials ({_said(error)}); {fix}") from None
        raise OSError(f"{what}: the store cannot be reached or fails ({_said(error)})") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _version(info: dict[str, Any]) -> str:
    """ETag, checksum or time of an object, whichever the store gives, and its size."""
    found = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if key in info), ""
    )
    return f"{str(found).strip(chr(34))} {info.get('size', '')}"
