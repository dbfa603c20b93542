"""Starts `bridle serve` as a user would, and stops it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 300.0


class Server:
    """A running service, its log and its processes."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, out: Path, models: tuple[Path, ...]) -> None:
        self.process = process
        self.models = models
        self.out = out
        self._log = log
        self.url = ""

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; every line must be JSON."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended with {self.process.returncode}: {self._log.read_text()}")
            for line in self.lines():
                if line["event"] == "ready":
                    self.url = f"http://127.0.0.1:{line['port']}"
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the service is not ready: {self._log.read_text()}")

    def children(self, kind: str) -> list[int]:
        """Process ids of the service's `decode` or `model` processes, found by their parent and their name."""
        services, parents = {self.process.pid, *self.http_processes()}, dict(_parents())
        return sorted(
            pid for pid, template in parents.items() if kind in _kinds(pid) and parents.get(template) in services
        )

    def http_processes(self) -> list[int]:
        """Process ids of the HTTP processes, where there are several."""
        found = []
        for pid, parent in _parents():
            with contextlib.suppress(OSError):  # it ends just now
                if parent == self.process.pid and b"--http-process\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return sorted(found)

    def metric(self, name: str, client: httpx.Client | None = None) -> float:
        """The sum of a metric over its labels."""
        text = (client or httpx).get(self.url + "/metrics", timeout=60).text
        rows = [line for line in text.splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, patience: float = 120.0) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def serving(
    folder: Path,
    *models: Path,
    wait: bool = True,
    env: dict[str, str] | None = None,
    program: Sequence[str] = ("-m", "bridle.cli"),
    **flags: Any,
) -> Iterator[Server]:
    """`bridle serve` on a free port. program: what Python runs; its standard output is kept in `out`."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    settings = {"port": 0, "device": "cpu", "decode_workers": 2, "threads": 1, "lame_duck_seconds": 0, **flags}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, *program, "serve", *map(str, models), *words]
    out = log.with_suffix(".out")
    with log.open("wb") as file, out.open("wb") as told:
        process = subprocess.Popen(command, stderr=file, stdout=told, env={**os.environ, **(env or {})}, cwd=folder)
    server = Server(process, log, out, models)
    try:
        if wait:
            server.wait_until_ready()
        yield server
    finally:
        server.stop()


def _field(status: str, name: str) -> str:
    return next(line.split()[1] for line in status.splitlines() if line.startswith(name + ":"))


def _parents() -> list[tuple[int, int]]:
    """Every process and its parent."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = status.read_text()
            found.append((int(_field(text, "Pid")), int(_field(text, "PPid"))))
    return found


def _kinds(pid: int) -> str:
    """What a process says it is; decoders and models name themselves."""
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
