"""The bounded local cache of remote shards, shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from bridle.data import fetch, index
from bridle.data.errors import ShardError
from bridle.data.files import written_aside
from bridle.files import sha256
from bridle.home import cache_folder
from bridle.remote.access import shown

log = logging.getLogger(__name__)
LARGEST_INDEX = 1 << 30
LEFTOVER_SECONDS = 24 * 3600
AGAIN = "upload the shard and its index again"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/bridle``, or ``~/.cache/bridle``; see `bridle.home` for a home that cannot be written."""
    return cache_folder() / "bridle"


class ShardCache:
    """Whole remote shards and their indexes in a local folder.

    Files are named by a hash of the whole URL, so that two ``s-0000.tar`` of different places never meet. The shards
    used longest ago go first when the bound is passed; indexes are small and stay.

    Args:
        folder: default `default_folder`.
        gigabytes: bound on the shards, in 10^9 bytes.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float = 50.0) -> None:
        self.folder = Path(folder).expanduser().absolute() if folder else default_folder()
        self.limit = int(gigabytes * 1e9)

    def index_path(self, url: str) -> Path:
        """Where the index of a remote shard, or of a local one in a read-only place, is kept."""
        return self.folder / "indexes" / f"{_hashed(url)}{index.SUFFIX}"

    def index_place(self, url: str) -> Path:
        """`index_path`, its folder made.

        Raises:
            ShardError: the cache cannot be written.
        """
        self._made("indexes")
        return self.index_path(url)

    def index_of(self, url: str) -> tuple[Path, index.Header]:
        """The index of a remote shard: ``URL.index`` where that exists, else made from the shard, fetched for it.

        Raises:
            ShardError: the shard cannot be had, or is not a tar.
        """
        path = self.index_place(url)
        with FileLock(f"{path}.lock"):
            return path, self._published(url, path) or self._kept(url, path) or self._made_from_shard(url, path)

    def fetch(self, url: str, header: index.Header | None = None, *, wait: bool = True) -> Path | None:
        """The local file of a remote shard, fetched if it is not there.

        Without `wait` the answer is none while another process is at it.

        Raises:
            ShardError: it cannot be had, does not fit the cache, or is not what the index says.
        """
        self._made("shards")
        path = self._shard_path(url)
        if self._is_there(path, header):
            return path
        try:
            with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
                if not self._is_there(path, header):
                    self._make_room(header.bytes if header else 0)
                    self._download(url, path, header)
        except Timeout:
            return None
        self._make_room(0, keep=path)
        return path

    def _published(self, url: str, path: Path) -> index.Header | None:
        address = _index_address(url)
        if address is None:
            return None
        try:
            with tempfile.TemporaryDirectory(prefix="bridle-") as folder:
                fetched = Path(folder) / path.name
                fetch.download(address, fetched, LARGEST_INDEX)
                content = fetched.read_bytes()
        except fetch.UnavailableError:
            return None
        except ShardError:
            if not path.exists():
                raise
            log.warning("%s: out of reach; the index fetched before is used", shown(address))
            return index.read_header(path)
        if path.exists() and path.read_bytes() == content:
            return index.read_header(path)
        try:
            header = index.parse_header(content.split(b"\n", 1)[0], shown(address))
            if content.count(b"\n") != header.samples + 1:
                raise ShardError(f"{shown(address)}: lines are missing")
        except ShardError as error:  # such as the page that a server gives for whatever it does not have
            fault = str(error).partition(";")[0]
            log.warning("%s; it is left alone, and the shard is fetched to make one", fault)
            return None
        self._shard_path(url).unlink(missing_ok=True)  # the shard that was fetched by the index before
        with written_aside(path) as stream:
            stream.write(content)
        return header

    def _shard_path(self, url: str) -> Path:
        return self.folder / "shards" / f"{_hashed(url)}.tar"

    def _kept(self, url: str, path: Path) -> index.Header | None:
        """The index made from the shard in an earlier run, if the shard still has its size."""
        try:
            header = index.read_header(path)
        except (ShardError, OSError):
            return None
        size = fetch.size_of(url)
        return header if size in {None, header.bytes} else None

    def _made_from_shard(self, url: str, path: Path) -> index.Header:
        log.info("%s has no index; fetching the shard to make one", shown(url))
        size = fetch.size_of(url)
        shard = self.fetch(url, None if size is None else index.Header(size, 0, {}, None))
        assert shard is not None
        try:
            header, entries = index.scan(shard, hashed=True)
        except ShardError as error:
            shard.unlink(missing_ok=True)
            raise ShardError(f"{shown(url)}: {str(error).removeprefix(f'{shard}: ')}") from None
        index.write(path, header, entries)
        return header

    def _download(self, url: str, path: Path, header: index.Header | None) -> None:
        name = shown(url)
        with written_aside(path) as stream:
            size = fetch.download(url, Path(stream.name), self.limit)
            if header and size != header.bytes:
                raise ShardError(f"{name}: {size} bytes, but its index says {header.bytes}; {AGAIN}")
            if header and header.sha256:
                _check_hash(Path(stream.name), header.sha256, name)
            elif header and header.samples:
                self._check_entries(Path(stream.name), url, header)

    def _check_entries(self, fetched: Path, url: str, header: index.Header) -> None:
        """Without a hash, the tar's own headers tell whether an index of the right size is its."""
        try:
            if index.scan(fetched)[1] == index.read(self.index_path(url))[1]:
                return
            fault = "its index was made for another tar of the same size"
        except ShardError as error:
            fault = str(error).removeprefix(f"{fetched}: ")
        raise ShardError(f"{shown(url)}: {fault}; {AGAIN}")

    def _is_there(self, path: Path, header: index.Header | None) -> bool:
        try:
            if header and path.stat().st_size != header.bytes:
                return False
            os.utime(path)  # used now
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, needed: int, keep: Path | None = None) -> None:
        """Deletes the shards used longest ago until the bound holds. A process that has one open keeps reading it."""
        if needed > self.limit:
            return  # the download refuses it with a better message
        folder = self._made("shards")
        with FileLock(str(folder / "room.lock")):
            shards = []
            for file in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    about = file.stat()
                    if file.suffix == ".partial" and time.time() - about.st_mtime > LEFTOVER_SECONDS:
                        file.unlink()
                    elif file.suffix == ".tar":
                        shards.append((about.st_mtime_ns, about.st_size, file))
            total = needed + sum(size for _, size, _ in shards)
            for _, size, file in sorted(shards):
                if total <= self.limit:
                    break
                if file != keep:
                    file.unlink(missing_ok=True)
                    total -= size

    def _made(self, name: str) -> Path:
        folder = self.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(
                f"cache folder {folder}: {error.strerror}; name a folder you may write"
                " (data.cache of a recipe, --cache of bridle shards)"
            ) from None
        return folder


def _hashed(url: str) -> str:
    base = "command" if url.startswith("pipe:") else Path(urlsplit(url).path).name.removesuffix(".tar")
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{re.sub(r'[^A-Za-z0-9_-]', '_', base)[:60]}"


def _index_address(url: str) -> str | None:
    """URL.index; none for a command, and for a signed URL, whose signature holds for one file."""
    return None if url.startswith("pipe:") or urlsplit(url).query else url + index.SUFFIX


def _check_hash(fetched: Path, expected: str, name: str) -> None:
    found = sha256(fetched)
    if found != expected:
        raise ShardError(f"{name}: sha256 {found[:16]}…, but its index says {expected[:16]}…; {AGAIN}")
