"""One run folder, one run: a lock with a heartbeat.

Whoever trains in a run folder holds its `lock.json`: who, where, since when, and a heartbeat that is rewritten every
`HEARTBEAT` seconds. A holder on the same machine is looked up among its processes, so that a killed run can be started
again at once. Any other is watched: if its heartbeat does not move for `STALE` seconds of the watcher's own clock, it
is dead and the lock changes hands; clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil

from bridle.files import clear_disk_errors
from bridle.settings import RecipeError

log = logging.getLogger("bridle")
HEARTBEAT = 5.0
"""Seconds between two heartbeats."""
STALE = 60.0
"""Seconds without a heartbeat after which a holder that cannot be looked up is dead."""
NAME = "lock.json"
SIZE = 1024
"""Bytes of a local lock file, always the same: rewriting it takes no room on a full disk."""


class RunHeldError(RecipeError):
    """Another process trains in this run folder."""


@dataclass(frozen=True)
class Holder:
    """What a lock says of its holder. Times are seconds since 1970 by the holder's clock; says: how its run is."""

    host: str
    machine: str
    pid: int
    born: float
    since: float
    heartbeat: float
    token: str
    says: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        now = time.time()
        born = psutil.Process().create_time()
        return cls(socket.gethostname(), machine(), os.getpid(), born, now, now, uuid.uuid4().hex)

    @classmethod
    def read(cls, text: str | None) -> Holder | None:
        """From the lock's text; none where there is none, or where it is not (yet) whole."""
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            return None

    def text(self) -> str:
        """The lock's text."""
        return json.dumps(asdict(self))

    def is_here(self) -> bool:
        """Whether its process can be looked up from this one."""
        return self.machine == machine()

    def lives(self) -> bool:
        """Whether its process is there; asks only on its own machine."""
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.born) < 5.0
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host}, since {since}"


def machine() -> str:
    """Names what process ids are unique in: this boot of this machine, and this container of it."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):  # noqa: PTH115
        with contextlib.suppress(OSError):
            parts.append(read().strip())
    return " ".join(parts)


class LockFile(Protocol):
    """Where a lock's text is kept. Each call is atomic, whoever else calls it."""

    def create(self, text: str) -> bool:
        """Writes the first text; false if somebody's is there."""

    def read(self) -> str | None:
        """The text that is there; none if there is none."""

    def replace(self, old: str, text: str) -> bool:
        """Puts `text` in the place of another's `old`; false if it is not there any more."""

    def rewrite(self, text: str) -> bool:
        """Puts `text` in the place of one's own; false if that was replaced or removed."""

    def remove(self) -> None:
        """Removes one's own text; leaves another's alone."""


class LocalLockFile:
    """A lock in a local or shared file system. One's own file is the one that stays open."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        self._file: int | None = None

    def create(self, text: str) -> bool:
        """See LockFile. Raises OSError where nothing can be written."""
        with clear_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            except FileExistsError:
                return False
            self._write(text)
        return True

    def read(self) -> str | None:
        """See LockFile."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def replace(self, old: str, text: str) -> bool:
        """See LockFile. Of several that try, one's rename finds the file; a fresh one moved by mistake goes back."""
        aside = self.path.with_name(f".{NAME}.{uuid.uuid4().hex}.old")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return False
        if aside.read_text(encoding="utf-8") != old:
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink()
        return self.create(text)

    def rewrite(self, text: str) -> bool:
        """See LockFile."""
        if not self._is_ours():
            return False
        self._write(text)
        return True

    def remove(self) -> None:
        """See LockFile. Folders that were made for the lock alone go too."""
        if self._is_ours():
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None
        with contextlib.suppress(OSError):
            for folder in self._new_folders:
                folder.rmdir()

    def _write(self, text: str) -> None:
        assert self._file is not None
        os.pwrite(self._file, text.ljust(SIZE - 1).encode() + b"\n", 0)
        os.fsync(self._file)

    def _is_ours(self) -> bool:
        if self._file is None:
            return False
        try:
            there, ours = self.path.stat(), os.fstat(self._file)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


class RunLock:
    """Held by rank 0 while a run trains.

    Args:
        file: where the lock is.
        what: the run folder's name in messages.
        lost: called from the heartbeat's thread when another run took the lock over, as it does after `stale` seconds
            of suspension: nothing may be written any more.
    """

    def __init__(
        self,
        file: LockFile,
        what: str,
        lost: Callable[[str], Any],
        heartbeat: float = HEARTBEAT,
        stale: float = STALE,
    ) -> None:
        self.file, self.what, self.lost = file, what, lost
        self.heartbeat, self.stale = heartbeat, stale
        self.says: Callable[[], dict[str, Any]] = dict
        """What a heartbeat says of the run: a few words, as the lock's file is small."""
        self.beaten: Callable[[bool], Any] = lambda written: None
        """Called after each heartbeat with whether it could be written."""
        self._released = threading.Event()
        self._writing = threading.Lock()
        self._holder: Holder | None = None

    def acquire(self) -> None:
        """Takes the lock; waits up to `stale` seconds to see whether a holder elsewhere is alive.

        Raises:
            RunHeldError: says who holds it.
            OSError: the run folder cannot be written.
        """
        watched, since = None, 0.0
        self._holder = Holder.this()
        while not self.file.create(self._holder.text()):
            found = self.file.read()
            if found is None:
                continue
            holder = Holder.read(found)
            if holder is not None and holder.is_here():
                if holder.lives():
                    raise self._held(holder)
            elif found != watched:
                if watched is not None and holder is not None:
                    raise self._held(holder)
                log.info(
                    "%s was left locked by %s; watching for up to %.0f s whether that run is alive",
                    self.what, holder or "an unknown process", self.stale,
                )  # fmt: skip
                watched, since = found, time.monotonic()
                continue
            elif time.monotonic() - since < self.stale:
                time.sleep(min(0.5, self.heartbeat))
                continue
            if self.file.replace(found, self._holder.text()):
                log.info("%s: the run of %s is dead; going on from what it left", self.what, holder or "nobody")
                break
        threading.Thread(target=self._beat, name="bridle-heartbeat", daemon=True).start()

    def check(self) -> None:
        """Writes a heartbeat now; calls `lost` if the lock is another's."""
        with self._writing:
            if self._holder is None or self._released.is_set():
                return
            try:
                alive = self.file.rewrite(replace(self._holder, heartbeat=time.time(), says=self.says()).text())
            except (OSError, RecipeError) as error:
                log.warning("%s: no heartbeat could be written (%s)", self.what, error)
                self.beaten(False)
                return
        self.beaten(alive)
        if not alive:
            self.lost(f"{self.what} was taken over by {Holder.read(self.file.read()) or 'another run'}")

    def release(self) -> None:
        """Gives the lock back; does nothing where it is not held."""
        with self._writing:
            if self._holder is not None and not self._released.is_set():
                self._released.set()
                self.file.remove()

    def _beat(self) -> None:
        while not self._released.wait(self.heartbeat):
            self.check()

    def _held(self, holder: Holder) -> RunHeldError:
        ago = max(0.0, time.time() - holder.heartbeat)
        return RunHeldError(
            f"{self.what} is in use: {holder}, heartbeat {ago:.0f} s ago, trains there; wait for it, stop it"
            f" (kill {holder.pid} on {holder.host}: it saves first), or give another --run folder"
        )
