"""The folder that bulk work writes to: on a disk, or in a store (``s3://…``). Files appear whole."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridle.errors import MistakeError
from bridle.files import sha256, whole_file
from bridle.remote.access import OutOfReachError, RefusedError, is_url
from bridle.remote.store import RemoteStore


class Store:
    """A folder by its path or URL. Names are relative, with ``/``. Safe to pickle.

    Raises:
        OSError: the place cannot be reached, or a library for it is missing.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") or "/"
        self.root = Path(address).absolute()
        with self._clear("use", ""):
            self.remote = RemoteStore(self.address) if is_url(address) else None

    def _path(self, name: str) -> Path:
        return self.root / name

    def shown(self, name: str) -> str:
        """The whole address of a file, for messages."""
        return f"{self.address}/{name}"

    @contextlib.contextmanager
    def put(self, name: str) -> Iterator[Path]:
        """Gives a local path to write to; on success the file appears at `name`, whole; on an error nothing does.

        Raises:
            OSError: no room, no permission, no bucket; the message names the file.
        """
        if self.remote is None:
            with whole_file(self._path(name)) as aside:
                yield aside
            return
        with tempfile.TemporaryDirectory(prefix="bridle-") as folder:
            aside = Path(folder) / "file"
            yield aside
            with self._clear("write", name):
                self.remote.put(aside, name)

    def put_bytes(self, name: str, content: bytes) -> None:
        """Writes a small file, whole. Raises OSError as `put`."""
        if self.remote is None:
            with whole_file(self._path(name)) as aside:
                aside.write_bytes(content)
            return
        with self._clear("write", name):
            self.remote.write(name, content)

    def put_json(self, name: str, value: Any) -> None:
        """Writes JSON, whole. Raises OSError as `put`."""
        self.put_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))

    def read(self, name: str) -> bytes | None:
        """A small file's content; none where there is none. Raises OSError as `put`."""
        with self._clear("read", name):
            if self.remote is not None:
                return self.remote.read(name)
            try:
                return self._path(name).read_bytes()
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
            raise MistakeError(f"{self.shown(name)}: not valid JSON ({error}); delete it and start again") from None

    def sizes(self, folder: str) -> dict[str, int]:
        """Names (relative to `folder`) and bytes of the files right in a folder; empty where there is none."""
        with self._clear("list", folder):
            if self.remote is not None:
                return self.remote.sizes(folder)
            there = self._path(folder)
            return {
                path.name: path.stat().st_size
                for path in (sorted(there.iterdir()) if there.is_dir() else ())
                if path.is_file() and not path.name.startswith(".")
            }

    def modified(self, name: str) -> float | None:
        """Time of a file's last change, in seconds since 1970; none where that is not known."""
        if self.remote is not None:
            return None
        try:
            return self._path(name).stat().st_mtime
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Whether anything is in the folder."""
        with self._clear("list", ""):
            if self.remote is not None:
                return not self.remote.is_empty()
            return self.root.is_dir() and any(not path.name.startswith(".") for path in self.root.iterdir())

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._clear("delete", name):
            if self.remote is not None:
                self.remote.remove(name)
            else:
                self._path(name).unlink(missing_ok=True)

    def sweep(self, folder: str, older_s: float) -> None:
        """Removes what killed writers left half-written in a folder on a disk: nobody has touched it for so long."""
        if self.remote is not None:
            return
        for path in self._path(folder).glob(".*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > older_s:
                    path.unlink()

    def sha256(self, name: str) -> str:
        """Hexadecimal SHA-256 of a file, read in pieces.

        Raises:
            OSError: it is not there, or as `put`.
        """
        if self.remote is None:
            return sha256(self._path(name))
        with self._clear("read", name):
            return self.remote.sha256(name)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """The file as a local path, fetched for the time being if it is remote.

        Raises:
            OSError: it is not there, or as `put`.
        """
        if self.remote is None:
            yield self._path(name)
            return
        with tempfile.TemporaryDirectory(prefix="bridle-") as folder:
            path = Path(folder) / name.rsplit("/", 1)[-1]
            with self._clear("read", name):
                self.remote.get(name, path)
            yield path

    @contextlib.contextmanager
    def _clear(self, verb: str, name: str) -> Iterator[None]:
        """Errors of a store as one line that says what was tried: the file, or the whole place, cannot be had."""
        try:
            yield
        except (RefusedError, OutOfReachError) as error:
            what = f"cannot {verb} {self.shown(name)}".rstrip("/")
            raise OSError(f"{what}: {error}; then start again: nothing is lost") from None
