"""The folder that bulk work writes to: on a disk, or any place that fsspec knows (``s3://…``). Files appear whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridle.files import sha256, whole_file

COPIED_AT_ONCE = 1 << 22


class Store:
    """A folder by its path or URL. Names are relative, with ``/``. Safe to pickle.

    Raises:
        OSError: the place cannot be reached, or a library for it is missing.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") or "/"
        self.remote = "://" in address
        self.root = self.address.split("://", 1)[1] if self.remote else str(Path(address).absolute())
        if self.remote:
            self._fs()

    def _fs(self) -> Any:
        import fsspec

        protocol = self.address.split("://", 1)[0]
        try:
            return fsspec.filesystem(protocol, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            advice = "pip install 'bridle[s3]'" if protocol == "s3" else "install what fsspec needs for it"
            raise OSError(f"{self.address}: {error}; {advice}") from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def shown(self, name: str) -> str:
        """The whole address of a file, for messages."""
        return f"{self.address}/{name}"

    @contextlib.contextmanager
    def put(self, name: str) -> Iterator[Path]:
        """Gives a local path to write to; on success the file appears at `name`, whole; on an error nothing does.

        Raises:
            OSError: no room, no permission, no bucket; the message names the file.
        """
        if not self.remote:
            with whole_file(Path(self._path(name))) as aside:
                yield aside
            return
        with tempfile.TemporaryDirectory(prefix="bridle-") as folder:
            aside = Path(folder) / "file"
            yield aside
            with self._clear("write", name):
                self._fs().put_file(str(aside), self._path(name))

    def put_bytes(self, name: str, content: bytes) -> None:
        """Writes a small file, whole. Raises OSError as `put`."""
        if self.remote:
            with self._clear("write", name):
                self._fs().pipe_file(self._path(name), content)
        else:
            with whole_file(Path(self._path(name))) as aside:
                aside.write_bytes(content)

    def put_json(self, name: str, value: Any) -> None:
        """Writes JSON, whole. Raises OSError as `put`."""
        self.put_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))

    def read(self, name: str) -> bytes | None:
        """A small file's content; none where there is none. Raises OSError as `put`."""
        with self._clear("read", name):
            try:
                content: bytes = (
                    self._fs().cat_file(self._path(name)) if self.remote else Path(self._path(name)).read_bytes()
                )
                return content
            except FileNotFoundError:
                return None

    def read_json(self, name: str) -> Any:
        """A JSON file's content; none where there is none.

        Raises:
            ValueError: damaged.
            OSError: as `put`.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise ValueError(f"{self.shown(name)}: not valid JSON ({error}); delete it and start again") from None

    def sizes(self, folder: str) -> dict[str, int]:
        """Names (relative to `folder`) and bytes of the files right in a folder; empty where there is none."""
        with self._clear("list", folder):
            if not self.remote:
                there = Path(self._path(folder))
                return {
                    path.name: path.stat().st_size
                    for path in (sorted(there.iterdir()) if there.is_dir() else ())
                    if path.is_file() and not path.name.startswith(".")
                }
            try:
                found = self._fs().ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            return {item["name"].rsplit("/", 1)[1]: int(item["size"]) for item in found if item["type"] == "file"}

    def modified(self, name: str) -> float | None:
        """Time of a file's last change, in seconds since 1970; none where that is not known."""
        if self.remote:
            return None
        try:
            return Path(self._path(name)).stat().st_mtime
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Whether anything is in the folder."""
        with self._clear("list", ""):
            if not self.remote:
                there = Path(self.root)
                return there.is_dir() and any(not path.name.startswith(".") for path in there.iterdir())
            try:
                return bool(self._fs().ls(self.root, detail=False))
            except FileNotFoundError:
                return False

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._clear("delete", name), contextlib.suppress(FileNotFoundError):
            if self.remote:
                self._fs().rm_file(self._path(name))
            else:
                Path(self._path(name)).unlink()

    def sweep(self, folder: str, older_s: float) -> None:
        """Removes what killed writers left half-written in a folder on a disk: nobody has touched it for so long."""
        if self.remote:
            return
        for path in Path(self._path(folder)).glob(".*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > older_s:
                    path.unlink()

    def sha256(self, name: str) -> str:
        """Hexadecimal SHA-256 of a file, read in pieces.

        Raises:
            OSError: it is not there, or as `put`.
        """
        if not self.remote:
            return sha256(Path(self._path(name)))
        digest = hashlib.sha256()
        with self._clear("read", name), self._fs().open(self._path(name), "rb", block_size=COPIED_AT_ONCE) as stream:
            while piece := stream.read(COPIED_AT_ONCE):
                digest.update(piece)
        return digest.hexdigest()

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """The file as a local path, fetched for the time being if it is remote.

        Raises:
            OSError: it is not there, or as `put`.
        """
        if not self.remote:
            yield Path(self._path(name))
            return
        with tempfile.TemporaryDirectory(prefix="bridle-") as folder:
            path = Path(folder) / name.rsplit("/", 1)[-1]
            with self._clear("read", name):
                self._fs().get_file(self._path(name), str(path))
            yield path

    @contextlib.contextmanager
    def _clear(self, verb: str, name: str) -> Iterator[None]:
        """Errors of the place as one line that names it; a file that is not there stays a FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            if self.remote and verb == "write":
                advice = "there is no such bucket or folder; make it first"
                raise OSError(f"cannot write {self.shown(name)}: {advice}") from None
            raise
        except OSError as error:
            if not self.remote:
                raise
            advice = "check bucket, permissions and network, then start again: nothing is lost"
            raise OSError(f"cannot {verb} {self.shown(name)}: {_said(error)}; {advice}") from None
        except Exception as error:  # clients of object stores have exceptions of their own kinds
            if not self.remote or isinstance(error, (ValueError, TypeError, KeyError)):
                raise
            raise OSError(f"cannot {verb} {self.shown(name)}: {_said(error)}; check credentials and network") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
