"""Servers under measurement, and clients of raw sockets that cost as little as they can."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


class Running:
    """A server process while it runs, with the CPU time and memory of it and all below it."""

    def __init__(self, command: list[str], port: int, probe: str) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        self._port, self._probe = port, probe

    def __enter__(self) -> Running:
        end = time.monotonic() + 180
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self._port), 5) as sock:
                    sock.sendall(f"GET {self._probe} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                    if b" 200 " in sock.recv(100):
                        return self
            except OSError:
                pass
            time.sleep(0.2)
        self.__exit__()
        raise SystemExit("the server does not start")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # LitServe leaves processes behind, which would burn on
            os.killpg(self._process.pid, signal.SIGKILL)

    def family(self) -> dict[int, list[str]]:
        """The processes' rows of /proc/PID/stat from the third field on, by process id."""
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = path.read_text()
            except OSError:
                continue
            stats[int(path.parent.name)] = text.rsplit(")", 1)[1].split()
        family = {self._process.pid}
        while more := {pid for pid, stat in stats.items() if int(stat[1]) in family} - family:
            family |= more
        return {pid: stats[pid] for pid in family if pid in stats}

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        return sum(int(stat[11]) + int(stat[12]) for stat in self.family().values()) / TICK

    def own_cpu(self) -> float:
        """Those of the first process alone."""
        stat = self.family()[self._process.pid]
        return (int(stat[11]) + int(stat[12])) / TICK

    def memory(self) -> int:
        """Proportional set size in bytes: memory that processes share is counted once."""
        total = 0
        for pid in self.family():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class RefusedError(Exception):
    """The service had no place (429)."""


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    """One request on an open connection; ends the program on any answer but 200 and 429.

    Raises:
        RefusedError: it was 429.
    """
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 429"):
        raise RefusedError
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"an answer was {head[:200]!r}")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))


async def closed_loop(
    port: int, requests: list[tuple[bytes, int]], clients: int, seconds: float
) -> tuple[list[float], int, float]:
    """Clients that each ask again once answered: times of the answers, items, and seconds in all."""
    times: list[float] = []
    items = 0
    began = time.perf_counter()

    async def one(turn: int) -> None:
        nonlocal items
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        while time.perf_counter() - began < seconds:
            request, count = requests[turn % len(requests)]
            start = time.perf_counter()
            await ask(reader, writer, request)
            times.append(time.perf_counter() - start)
            items += count
            turn += 1
        writer.close()

    await asyncio.gather(*(one(i) for i in range(clients)))
    return times, items, time.perf_counter() - began


async def open_loop(port: int, requests: list[tuple[bytes, int]], rate: float, seconds: float) -> list[float]:
    """Requests at a steady rate whatever the answers do; times count from when a request was due, and are infinite for
    those that were refused."""
    times: list[float] = []

    async def one(turn: int, due: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        try:
            await ask(reader, writer, requests[turn % len(requests)][0])
            times.append(time.perf_counter() - due)
        except RefusedError:
            times.append(math.inf)
        writer.close()

    tasks = []
    began = time.perf_counter()
    for turn in range(max(1, int(rate * seconds))):
        due = began + turn / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(turn, due)))
    await asyncio.gather(*tasks)
    return times
