"""A folder in a store: its files read, written, listed and removed by name."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bridle.remote.access import RefusedError, file_system, tried, unknown_scheme

T = TypeVar("T")
READ_AT_ONCE = 1 << 22


class RemoteStore:
    """Files below a URL, by their relative names. Nothing that was read or listed is remembered. Safe to pickle.

    Raises:
        RefusedError: an unknown kind of store, no such bucket, no credentials, or not ours to read or write.
        OutOfReachError: anything else, after some tries: the network most likely.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, path = url.partition("://")
        if not path.strip("/"):
            raise RefusedError(f"{url}: expected {scheme}://BUCKET/PREFIX")
        if (fault := unknown_scheme(url)) is not None:
            raise RefusedError(f"{url}: {fault}")
        file_system(self.url)
        self._is_s3 = scheme == "s3"

    def list(self) -> dict[str, str]:
        """All files, and for each what changes whenever it is written."""

        def once(fs: Any, root: str) -> dict[str, str]:
            found = fs.find(root, detail=True)
            return {name.removeprefix(f"{root}/"): _version(info) for name, info in found.items()}

        return self._tried("", once)

    def sizes(self, folder: str) -> dict[str, int]:
        """Names (relative to `folder`) and bytes of the files right in a folder; empty where there is none."""

        def once(fs: Any, path: str) -> dict[str, int]:
            try:
                found = fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            return {item["name"].rsplit("/", 1)[1]: int(item["size"]) for item in found if item["type"] == "file"}

        return self._tried(folder, once)

    def is_empty(self) -> bool:
        """Whether nothing is there, neither file nor folder."""

        def once(fs: Any, path: str) -> bool:
            try:
                return not fs.ls(path, detail=False)
            except FileNotFoundError:
                return True

        return self._tried("", once)

    def put(self, file: Path, name: str) -> None:
        """Uploads a file that nobody writes to, whole or not at all."""
        self._tried(name, lambda fs, path: fs.put_file(str(file), path))

    def version(self, name: str) -> str:
        """What `list` says of a file that is there."""
        return self._tried(name, lambda fs, path: _version(fs.info(path)))

    def get(self, name: str, file: Path) -> None:
        """Downloads a file."""
        self._tried(name, lambda fs, path: fs.get_file(path, str(file)))

    def read(self, name: str) -> bytes | None:
        """A small file's content; none where there is none."""

        def once(fs: Any, path: str) -> bytes | None:
            try:
                return bytes(fs.cat_file(path))
            except FileNotFoundError:
                return None

        return self._tried(name, once)

    def read_text(self, name: str) -> str | None:
        """The same as text."""
        content = self.read(name)
        return None if content is None else content.decode()

    def sha256(self, name: str) -> str:
        """Hexadecimal SHA-256 of a file, read in pieces."""

        def once(fs: Any, path: str) -> str:
            digest = hashlib.sha256()
            with fs.open(path, "rb", block_size=READ_AT_ONCE) as stream:
                while piece := stream.read(READ_AT_ONCE):
                    digest.update(piece)
            return digest.hexdigest()

        return self._tried(name, once)

    def etag(self, name: str) -> str:
        """What `write` takes as `if_match`; empty where there is no such file."""

        def once(fs: Any, path: str) -> str:
            try:
                return str(fs.info(path).get("ETag", ""))
            except FileNotFoundError:
                return ""

        return self._tried(name, once)

    def write(self, name: str, data: bytes, if_match: str | None = None) -> bool:
        """Writes a file; on S3 only if the one there has the ETag `if_match` (empty: if there is none), else false."""
        conditions = {None: {}, "": {"IfNoneMatch": "*"}}.get(if_match, {"IfMatch": if_match})

        def once(fs: Any, path: str) -> bool:
            try:
                fs.pipe_file(path, data, **(conditions if self._is_s3 else {}))
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

        def once(fs: Any, path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(path)

        self._tried(name, once)

    def _tried(self, name: str, once: Callable[[Any, str], T]) -> T:
        url = f"{self.url}/{name}".rstrip("/")
        return tried(url, lambda: once(*file_system(url)))


def _version(info: dict[str, Any]) -> str:
    """ETag, checksum or time of an object, whichever the store gives, and its size."""
    found = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if key in info), ""
    )
    return f"{str(found).strip(chr(34))} {info.get('size', '')}"
