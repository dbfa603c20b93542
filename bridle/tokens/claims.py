"""Who is at which unit: small files that say so, renewed while their owner lives. What a lost owner left is taken over.

Outputs appear whole and do not depend on who writes them, so two owners of one unit cost time and nothing else. That is
why claims may be simple: no clocks are compared, and none must be exact.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from bridle.tokens.store import Store

FOLDER = "claims"
BEATS_OF_A_LEASE = 4


class Claims:
    """The claims of one process. Use it as a context: it renews its claims in a thread until it ends.

    Args:
        store: the output. rank: of this process. lease_s: seconds after which a claim that nobody renews is lost.
    """

    def __init__(self, store: Store, rank: int, lease_s: float) -> None:
        self.store, self.rank, self.lease_s = store, rank, lease_s
        self.nonce = uuid.uuid4().hex
        self._mine: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._beat = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Claims:
        threading.Thread(target=self._renew, name="bridle-claims", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for name in list(self._mine):
            with contextlib.suppress(OSError):
                self.release(name)

    def take(self, name: str) -> bool:
        """Claims a unit, unless another process that seems to live has.

        Raises:
            OSError: see `Store.put`.
        """
        found = self.store.read(_file(name))
        if found is not None and not self._is_lost(name, found):
            return False
        with self._lock:
            self._mine.add(name)
            self.store.put_bytes(_file(name), self._content())
        return True

    def release(self, name: str) -> None:
        """Gives a claim back: the unit is done, or will not be done here."""
        with self._lock:
            self._mine.discard(name)
            self.store.delete(_file(name))

    def _is_lost(self, name: str, found: bytes) -> bool:
        """Whether the owner is gone: a dead process of this machine, or one that has been silent too long."""
        owner = _parsed(found)
        if owner.get("nonce") == self.nonce:
            return True
        if owner.get("host") == _host() and owner.get("started") != _started(owner.get("pid")):
            return True
        before = self._seen.get(name)
        if before is None or before[0] != found:
            self._seen[name] = (found, time.monotonic())
            return False
        return time.monotonic() - before[1] > self.lease_s

    def _content(self) -> bytes:
        pid = os.getpid()
        owner = {"rank": self.rank, "host": _host(), "pid": pid, "started": _started(pid), "nonce": self.nonce}
        return json.dumps({**owner, "beat": self._beat}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self.lease_s / BEATS_OF_A_LEASE):
            self._beat += 1
            with self._lock, contextlib.suppress(OSError):  # the work itself meets the same fault, and reports it
                for name in self._mine:
                    self.store.put_bytes(_file(name), self._content())


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _host() -> str:
    """This machine's name and boot, since pods of one name come and go, and whose processes we see: containers of one
    machine may share its name (hostNetwork), and none finds another's."""
    with contextlib.suppress(OSError):
        boot, seen = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").readlink()
        return f"{socket.gethostname()} {boot} {seen}"
    return socket.gethostname()


def _started(pid: Any) -> str | None:
    """When a process of this machine began, in the kernel's ticks; none where it is gone, or where no /proc says so."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None
