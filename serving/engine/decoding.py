"""The pool of decoding processes of one model."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from bridle.modalities import clip as clip_module
from bridle.modalities.clip import ClipError, TooLargeError, UndecodableError
from serving.engine.errors import EngineError, FaultError, ProcessEndedError
from serving.logs import log
from serving.metrics import Metrics
from serving.workers import decode_worker
from serving.workers.arena import Arena
from serving.workers.processes import Child, ProcessGoneError

MAX_PICTURE = 64 * 1024 * 1024
"""Bytes of a picture for people; the only payload that a decoding process may send."""
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
"""Signals that a decoder's own fault raises; any other end came from outside."""


@dataclass(frozen=True)
class Window:
    """A clip in shared memory. Who holds it must release its slot."""

    slot: int
    valid: int
    start_s: float | None
    duration_s: float | None


class _Worker:
    """A decoding process with the messages it sent, read by a task of its own so that no job can cut one in two."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.messages: asyncio.Queue[tuple[dict[str, Any], bytes] | None] = asyncio.Queue()
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                self.messages.put_nowait(await self.child.channel.receive())
        except (EOFError, ConnectionError):
            self.messages.put_nowait(None)

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        message = await self.messages.get()
        if message is None:
            raise EOFError
        return message


class DecodePool:
    """Decoding processes that take one file at a time, and are replaced when they end."""

    def __init__(self, name: str, config: dict[str, Any], count: int, arena: Arena, metrics: Metrics) -> None:
        self._name = name
        self._config = config
        self._count = count
        self._arena = arena
        self._metrics = metrics
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.active = 0
        """Files waiting for a decoder or being decoded at this moment."""
        self.changed = asyncio.Event()
        """Set whenever `active` falls."""

    async def start(self) -> None:
        """Starts all processes.

        Raises:
            ProcessGoneError, RuntimeError: one did not start.
        """
        for worker in await asyncio.gather(*(self._new() for _ in range(self._count))):
            self._idle.put_nowait(worker)
        if not all(worker.child.hello.get("offline") for worker in self._workers):
            log("warning", "decoders could not give up the network; forbid it in the container", model=self._name)

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders."""
        return [worker.child.pid for worker in self._workers]

    async def windows(self, data: bytes | bytearray) -> AsyncGenerator[Window, None]:
        """A file's clips, in order. The receiver releases each one's slot.

        Raises:
            ClipError: the file is at fault. EngineError: the process ended through no fault of the file.
        """
        granted: set[int] = set()
        began = time.perf_counter()
        job = self._job("windows", data, granted)
        try:
            async for header, _ in job:
                found = header.get("slot")
                if found not in granted:
                    raise ProcessGoneError(None)
                granted.discard(found)
                now = time.perf_counter()
                self._metrics.decode_seconds.labels(self._name).observe(now - began)
                yield Window(found, int(header["valid"]), header["start_s"], header["duration_s"])
                began = time.perf_counter()
        finally:
            await job.aclose()

    async def picture(self, data: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
        """A PNG for people, and its measures.

        Raises:
            ClipError, EngineError: see `windows`.
        """
        answer: tuple[dict[str, Any], bytes] | None = None
        async with contextlib.aclosing(self._job("picture", data, set())) as job:
            async for message in job:
                answer = message
        assert answer is not None
        return answer

    async def _job(self, operation: str, data: bytes | bytearray, granted: set[int]) -> AsyncGenerator[Any, None]:
        """Runs one job and yields its messages. Slots left in `granted` go back afterwards.

        A job asks for slots only once it has a process: those who wait in line must not hold what others need to end.
        """
        self.active += 1
        worker: _Worker | None = None
        settled = False
        try:
            worker = await self._take()
            header: dict[str, Any] = {"op": operation}
            if operation == "windows":
                granted.add(slot := await self._arena.acquire())
                header["slot"] = slot
            await worker.child.channel.send(header, data)
            while True:
                message, payload = await worker.receive()
                if "need" in message:
                    granted.add(slot := await self._arena.acquire())
                    await worker.child.channel.send({"slot": slot})
                elif "error" in message:
                    settled = True
                    raise _failure(message)
                elif "done" in message:
                    settled = True
                    if operation == "picture":
                        yield message, payload
                    return
                else:
                    yield message, payload
        except (EOFError, ConnectionError):
            assert worker is not None
            settled = True
            raise await self._replace(worker) from None
        finally:
            self.active -= 1
            self.changed.set()
            if worker is None or settled:
                self._release(granted)
                if worker in self._workers:
                    self._idle.put_nowait(worker)
            else:
                self._spawn(self._settle(worker, granted))

    async def _take(self) -> _Worker:
        """An idle process that is alive; one that somebody has ended meanwhile is replaced."""
        while True:
            worker = await self._idle.get()
            if not worker.reader.done():
                return worker
            await self._replace(worker)

    async def _settle(self, worker: _Worker, granted: set[int]) -> None:
        """Ends a job that nobody waits for any more; its slots are free only when the process has let go of them."""
        try:
            await worker.child.channel.send({"cancel": True})
            while True:
                message, _ = await worker.receive()
                if "done" in message or "error" in message:
                    break
            self._idle.put_nowait(worker)
        except (EOFError, ConnectionError):
            await self._replace(worker)
        finally:
            self._release(granted)

    def _release(self, granted: set[int]) -> None:
        for slot in granted:
            self._arena.release(slot)
        granted.clear()

    async def _new(self) -> _Worker:
        child = await Child.start(decode_worker.main, f"decode-{self._name}", self._arena.fd, self._config, MAX_PICTURE)
        worker = _Worker(child)
        self._workers.add(worker)
        return worker

    async def _replace(self, worker: _Worker) -> Exception:
        """What to tell the one whose file the process had; another process starts meanwhile."""
        self._workers.discard(worker)
        code = await worker.child.end()
        if not self._closed:
            self._metrics.worker_restarts.labels("decode", self._name).inc()
            log("warning", "a decoding process ended; starting another", model=self._name, exit_code=code)
            self._spawn(self._restart())
        if code == -signal.SIGALRM:
            seconds = self._config["seconds"]
            return TooLargeError(f"decoding took longer than decode_seconds = {seconds:g}; send a smaller file")
        if code is not None and -code in CRASHES:
            return UndecodableError("the decoder crashed on the content; it is corrupt")
        return ProcessEndedError("the decoding process ended; send the request again")

    async def _restart(self) -> None:
        pause = 0.1
        while not self._closed:
            try:
                worker = await self._new()
            except (OSError, RuntimeError, EOFError, TimeoutError) as error:
                log("error", "a decoding process does not start", model=self._name, error=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10.0)
            else:
                self._idle.put_nowait(worker)
                return

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends all processes."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.child.end() for worker in self._workers), return_exceptions=True)
        self._workers.clear()


def _failure(message: dict[str, Any]) -> ClipError | EngineError:
    if message.get("traceback"):
        return FaultError(str(message["message"])[:1000], str(message["traceback"]))
    kind = getattr(clip_module, str(message["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, ClipError)):
        kind = UndecodableError
    return kind(str(message.get("message", ""))[:1000])
