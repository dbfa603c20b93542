"""Child processes of the service: forked from a clean, warmed-up template, spoken to over a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

from serving.workers.wire import Channel

START_SECONDS = 300.0
"""Time for a process to start and warm up."""

_PR_SET_NAME = 15
_CONTEXT = multiprocessing.get_context("forkserver")
_SECRET = re.compile(r"^(BRIDLE|OTEL)_|KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)

_ADDED = {
    "PYTHONSAFEPATH": "1",  # a file in the current folder must not stand for a library's module
    # Idle threads of a model process must not burn the decoders' time; those that wait for the next operator of a
    # forward pass should spin a moment: asleep, they cost a ViT-S 12 of 74 ms a picture (benchmarks/serving.py).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
    # For glibc: keep the pages of the last batch; fetching them anew costs a ViT-Ti 2 of 37 ms a picture at batch 8.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 27),
}
"""To the environment of decoding and model processes, unless the service's own says otherwise."""

Main = Callable[[socket.socket], None]


class ProcessGoneError(ConnectionError):
    """The process ended. `code` is its exit code, minus the signal where one ended it; none if unknown."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the process ended with code {code}")
        self.code = code


def start_template() -> None:
    """Starts the process that others are forked from. It never sees the service's secrets, sockets or memory."""
    _CONTEXT.set_forkserver_preload(["serving.workers.preload"])
    with _their_environment():
        forkserver.ensure_running()


@contextmanager
def _their_environment() -> Iterator[None]:
    hidden = {name: value for name, value in os.environ.items() if _SECRET.search(name)}
    added = {name: value for name, value in _ADDED.items() if name not in os.environ}
    try:
        for name in hidden:
            del os.environ[name]
        os.environ.update(added)
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        os.environ.update(hidden)


class Child:
    """One process and the channel to it."""

    def __init__(self, process: Any, channel: Channel, hello: dict[str, Any]) -> None:
        self._process = process
        self.channel = channel
        self.hello = hello
        """What it said when it was ready."""

    @classmethod
    async def start(cls, main: Main, name: str, fd: int, config: dict[str, Any], max_payload: int) -> Child:
        """Starts `main(socket)` in a process, hands it the file `fd` and the configuration, waits until it is ready.

        Raises:
            ProcessGoneError: it ended before it was ready. RuntimeError: it said why it cannot start.
        """
        ours, theirs = socket.socketpair()
        process = _CONTEXT.Process(target=main, args=(theirs,), name=name, daemon=True)
        try:
            await asyncio.to_thread(process.start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        socket.send_fds(ours, [b"f"], [fd])
        ours.setblocking(False)
        channel = await Channel.over(ours, max_payload)
        child = cls(process, channel, {})
        try:
            async with asyncio.timeout(START_SECONDS):
                await channel.send(config)
                child.hello, _ = await channel.receive()
        except (EOFError, ConnectionError):
            raise ProcessGoneError(await child.end()) from None
        except BaseException:
            await child.end()
            raise
        if "error" in child.hello:
            await child.end()
            raise RuntimeError(child.hello["error"])
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    async def end(self, patience: float = 2.0) -> int | None:
        """Closes the channel, which ends the process, and kills it if it stays. Returns its exit code."""
        self.channel.close()
        end = time.monotonic() + patience
        while self._process.is_alive():
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            await asyncio.sleep(0.005)
        code = self._process.exitcode
        self._process.close()
        return int(code) if code is not None else None


def receive_file(sock: socket.socket) -> int:
    """In the child: the file handed over by `Child.start`."""
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    return fds[0]


def settle_in(name: str) -> None:
    """In the child: a name to be seen by, and a session of its own, so that a Ctrl-C or a signal to the service's
    group does not reach it."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
