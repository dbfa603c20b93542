"""A run folder in an object store: a working folder on rank 0's disk, and a copy of it there that is always whole.

Checkpoints, results and models are uploaded file by file, the one that makes them whole (`manifest.json`,
`config.json`) last; metrics go before them, so that no checkpoint is without its rows. A start on an empty node fetches
what is whole there and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bridle.data.cache import default_folder
from bridle.files import whole_file, whole_folder, write_json
from bridle.remote.access import is_url
from bridle.remote.store import RemoteStore
from bridle.settings import RecipeError
from bridle.training import lock

log = logging.getLogger("bridle")
RECORD = ".uploaded.json"
"""In the working folder: its run's id, and what is the same in the store, ``{name: [size, time, version there]}``."""
ID = "run-id"
UNIT = re.compile(r"(checkpoints/phase-\d+-\w+/(?:finished|step-\d+)|models/[^/.]+)/[^/]+")
"""Files of folders that are whole or of no use."""


class RemoteRun:
    """Rank 0's working folder, and the store it is copied to.

    Args:
        url: of the run folder.
        folder: the working folder; by default one in the cache, always the same for the same URL.
    """

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.store = RemoteStore(url)
        place = hashlib.sha256(self.store.url.encode()).hexdigest()[:16]
        self.folder = folder or default_folder() / "runs" / place / self.store.url.rpartition("/")[2]
        self.id = uuid.uuid4().hex
        self.record: dict[str, list[int | str]] = {}

    def fetch(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Makes the working folder what the store holds; whole units only, and of them only those that are `wanted`.

        What the working folder alone holds is removed, unless it is further than the store: then an upload was missing
        when this run ended, and `push` will make up for it.
        """
        there = self.store.list()
        self._read_record(self.store.read_text(ID) if ID in there else None)
        whole = _units(there)
        torn = [name for name in there if (found := UNIT.fullmatch(name)) and found[1] not in whole]
        self.record |= {name: [0, 0, there[name]] for name in torn}  # not here, so that `push` removes them
        units = {unit: names for unit, names in whole.items() if wanted(f"{unit}/")}
        if _furthest(self._local_units()) > _furthest(units):
            log.info("%s is further than %s; the rest will be uploaded", self.folder, self.store.url)
            return
        for unit in self._local_units().keys() - units.keys():
            shutil.rmtree(self.folder / unit)
        for unit, names in sorted(units.items()):
            if not all(self._is_same(name, there.get(name)) for name in names):
                log.info("fetching %s/%s", self.store.url, unit)
                with whole_folder(self.folder / unit) as aside:
                    for name in names:
                        self.store.get(name, aside / Path(name).name)
                self._note(names, there)
        for name in (name for name in there if _is_loose(name) and wanted(name)):
            if not self._is_same(name, there[name]):
                with whole_file(self.folder / name) as aside:
                    self.store.get(name, aside)
                self._note([name], there)
        self._write_record()

    def push(self) -> None:
        """Makes the store what the working folder holds, newest last.

        Raises:
            OSError: the store cannot be reached; what it held stands, and the next call uploads what is missing.
        """
        if ID not in self.record:
            with whole_file(self.folder / ID) as aside:
                aside.write_text(self.id)
        loose = [path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if path.is_file()]
        for name in filter(_is_loose, loose):
            if not self._is_same(name):
                self._upload(name)
        units = self._local_units()
        for names in (units[unit] for unit in sorted(units, key=_age)):
            if not all(map(self._is_same, names)):
                self._remove([name for name in names[::-1] if name in self.record])
                for name in names:
                    self._upload(name)
        kept = {name for names in units.values() for name in names}
        gone = [name for name in self.record if UNIT.fullmatch(name) and name not in kept]
        self._remove(sorted(gone, key=_marks_last, reverse=True))
        self._write_record()

    def lock_file(self) -> RemoteLockFile:
        """The run's lock, in the store."""
        return RemoteLockFile(self.store)

    def _local_units(self) -> dict[str, list[str]]:
        found = [*self.folder.glob("checkpoints/phase-*/*/*"), *self.folder.glob("models/*/*")]
        return _units(path.relative_to(self.folder).as_posix() for path in found)

    def _upload(self, name: str) -> None:
        state = self._state(name)
        if _is_loose(name):  # rows may be added meanwhile
            self.store.write(name, (self.folder / name).read_bytes())
        else:
            self.store.put(self.folder / name, name)
        self.record[name] = [*state, self.store.version(name)]

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.store.remove(name)
            del self.record[name]

    def _state(self, name: str) -> list[int | str]:
        found = (self.folder / name).stat()
        return [found.st_size, found.st_mtime_ns]

    def _is_same(self, name: str, version: str | None = None) -> bool:
        """Whether a local file is what was uploaded or fetched, and (where given) the store still has that version."""
        noted = self.record.get(name)
        if noted is None or not (self.folder / name).is_file():
            return False
        return noted[:2] == self._state(name) and version in (None, noted[2])

    def _note(self, names: Iterable[str], there: dict[str, str]) -> None:
        for name in names:
            self.record[name] = [*self._state(name), there[name]]

    def _read_record(self, run_id: str | None) -> None:
        """The record, if it is of the run that the store holds; else the working folder is another run's, and goes."""
        path = self.folder / RECORD
        if run_id is not None:
            self.id = run_id
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["id"] == run_id:
                    self.record = found["files"]
                    return
            except (OSError, ValueError, KeyError, TypeError):
                log.debug("%s: none, or not readable; everything is fetched", path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_record(self) -> None:
        write_json(self.folder / RECORD, {"id": self.id, "files": self.record})


@contextlib.contextmanager
def on_disk(run: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """The folder of a run; of one in a store a copy of what is `wanted`, which goes when the context ends.

    Raises:
        RecipeError, OSError: see `RemoteStore`.
    """
    if not is_url(run):
        yield Path(run)
        return
    with tempfile.TemporaryDirectory(prefix="bridle-") as folder:
        copy = RemoteRun(run, Path(folder) / run.rstrip("/").rpartition("/")[2])
        copy.fetch(wanted)
        if not (copy.folder / "recipe.yaml").is_file():
            raise RecipeError(f"{run}: no run there; check bucket, prefix and AWS_ENDPOINT_URL")
        yield copy.folder


def is_result(name: str) -> bool:
    """For `on_disk`: what finished phases left, the recipe and other small files."""
    return "/finished/" in name or _is_loose(name)


def is_reported(name: str) -> bool:
    """For `on_disk`: metrics, recipe and models."""
    return name.startswith("models/") or _is_loose(name)


class RemoteLockFile:
    """`lock.json` in a store, written under S3's conditions: of several that try, one succeeds. See `lock.LockFile`."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self._ours: str | None = None

    def create(self, text: str) -> bool:
        """See LockFile."""
        return self._written(text, "")

    def read(self) -> str | None:
        """See LockFile."""
        return self.store.read_text(lock.NAME)

    def replace(self, old: str, text: str) -> bool:
        """See LockFile."""
        etag = self.store.etag(lock.NAME)
        return self.read() == old and self._written(text, etag)

    def rewrite(self, text: str) -> bool:
        """See LockFile."""
        return self._ours is not None and self.replace(self._ours, text)

    def remove(self) -> None:
        """See LockFile."""
        if self._ours is not None and self.read() == self._ours:
            self.store.remove(lock.NAME)
        self._ours = None

    def _written(self, text: str, etag: str) -> bool:
        # Tried again after an answer that got lost, it finds its own text, and the condition no longer holds.
        written = self.store.write(lock.NAME, text.encode(), if_match=etag) or self.read() == text
        self._ours = text if written else self._ours
        return written


def _units(names: Iterable[str]) -> dict[str, list[str]]:
    """Whole units and their files, the one that makes them whole last."""
    units: dict[str, list[str]] = {}
    for name in names:
        found = UNIT.fullmatch(name)
        if found:
            units.setdefault(found[1], []).append(name)
    return {unit: sorted(files, key=_marks_last) for unit, files in units.items() if any(map(_marks_last, files))}


def _marks_last(name: str) -> bool:
    return name.rpartition("/")[2] == ("config.json" if name.startswith("models/") else "manifest.json")


def _is_loose(name: str) -> bool:
    """Metrics, recipe and the like: everything but units, what was set aside, what is hidden, and the lock."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and not name.startswith(("checkpoints/", "models/")) and name != lock.NAME


def _age(unit: str) -> tuple[int, int, int]:
    """How far a checkpoint or a result is: phase, whether it ends it, step. Models are before them all."""
    found = re.match(r"checkpoints/phase-(\d+)-\w+/(?:(finished)|step-(\d+))", unit)
    return (int(found[1]), int(found[2] is not None), int(found[3] or 0)) if found else (-1, 0, 0)


def _furthest(units: Iterable[str]) -> tuple[int, int, int]:
    return max(map(_age, units), default=(-1, 0, 0))
