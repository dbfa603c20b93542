"""The pool of decoding processes of one model."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from bridle.modalities.clip import ClipError, TooLargeError, UndecodableError
from bridle.modalities.isolation import clip_error
from bridle.processes.async_child import AsyncChild
from bridle.processes.errors import ProtocolError
from bridle.processes.messages import (
    BeginDecoder,
    Cancel,
    Decode,
    Decoded,
    Draw,
    Drawn,
    End,
    Fault,
    FromDecoder,
    Need,
    Refused,
    Slot,
    ToDecoder,
)
from serving.engine.errors import EngineError, FaultError, ProcessEndedError
from serving.engine.turns import Turns
from serving.logs import log
from serving.metrics import Metrics
from serving.workers.arena import Arena

T = TypeVar("T")
MAX_PICTURE = 64 * 1024 * 1024
"""Bytes of a picture for people; the only payload that a decoding process may send."""
LET_GO_SECONDS = 0.25
"""How long a decoder may go on with a file that nobody waits for any more; then it is ended and replaced."""
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
"""Signals that a decoder's own fault raises; any other end came from outside."""

Window = Decoded
"""A clip in shared memory. Who holds it must release its slot."""


class DecodePool:
    """Decoding processes that take one file at a time, and are replaced when they end.

    share: of the processes that one owner of files gets while others are about.
    changed: called whenever `active` falls.
    """

    def __init__(
        self,
        name: str,
        begin: BeginDecoder,
        count: int,
        share: float,
        arena: Arena,
        metrics: Metrics,
        changed: Callable[[], None],
    ) -> None:
        self._name = name
        self._begin = begin
        self._count = count
        self._arena = arena
        self._metrics = metrics
        self._changed = changed
        self._turns: Turns[AsyncChild] = Turns(share)
        self._workers: set[AsyncChild] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.active = 0
        """Files waiting for a decoder or being decoded at this moment."""

    async def start(self) -> None:
        """Starts all processes.

        Raises:
            ProcessGoneError, ChildError: one did not start.
        """
        for worker in await asyncio.gather(*(self._new() for _ in range(self._count))):
            self._turns.free(worker, self._count)
        if not all(worker.hello.offline for worker in self._workers):
            log("warning", "decoders could not give up the network; forbid it in the container", model=self._name)

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders."""
        return [worker.pid for worker in self._workers]

    async def windows(self, data: bytes | bytearray) -> AsyncGenerator[Window, None]:
        """A file's clips, in order. The receiver releases each one's slot.

        Raises:
            ClipError: the file is at fault. EngineError: the process ended through no fault of the file.
        """
        began = time.perf_counter()
        async with contextlib.aclosing(self._job(None, data)) as job:
            async for window, _ in job:
                self._metrics.decode_seconds.labels(self._name).observe(time.perf_counter() - began)
                yield window
                began = time.perf_counter()

    async def picture(self, data: bytes | bytearray) -> tuple[Drawn, bytes]:
        """A PNG for people, and its measures.

        Raises:
            ClipError, EngineError: see `windows`.
        """
        async with contextlib.aclosing(self._job(Draw(), data)) as job:
            async for drawn, png in job:
                return drawn, png
        raise FaultError("a decoder drew nothing", "")

    async def _job(self, draw: Draw | None, data: bytes | bytearray) -> AsyncGenerator[tuple[Any, bytes], None]:
        """Runs one job and yields its clips, or the picture. Slots that no clip came in go back afterwards.

        A job asks for slots only once it has a process: those who wait in line must not hold what others need to end.
        """
        self.active += 1
        worker: AsyncChild | None = None
        granted: set[int] = set()
        settled = True  # until the process is asked for something
        try:
            worker = await self._take()
            if draw is None:
                granted.add(slot := await self._arena.acquire())
            settled = False
            await worker.channel.send(draw or Decode(slot), data)
            while True:
                message, payload = await worker.channel.receive()
                if isinstance(message, Need):
                    granted.add(slot := await self._arena.acquire())
                    await worker.channel.send(Slot(slot))
                elif isinstance(message, Decoded):
                    if message.slot not in granted:
                        raise ProtocolError("a clip in a slot that is another's")
                    granted.discard(message.slot)
                    settled = message.last
                    yield message, payload
                    if settled:
                        return
                else:
                    settled = True
                    if isinstance(message, Drawn):
                        yield message, payload
                    elif not isinstance(message, End):
                        raise _failure(message)
                    return
        except (EOFError, ConnectionError):
            assert worker is not None
            settled = True
            held, granted = granted, set()  # they are free when the process has ended, whoever waits for that
            raise await self._replace(worker, held) from None
        finally:
            self.active -= 1
            self._changed()
            if worker is None or settled:
                self._release(granted)
                if worker in self._workers:
                    self._turns.free(worker, self._count)
            else:
                self._spawn(self._settle(worker, granted))

    async def _take(self) -> AsyncChild:
        """An idle process that is alive; one that somebody has ended meanwhile is replaced."""
        while True:
            worker = await self._turns.take(self._count)
            if not worker.channel.ended:
                return worker
            await self._replace(worker, set())

    async def _settle(self, worker: AsyncChild, granted: set[int]) -> None:
        """Ends a job that nobody waits for any more; its slots are free only when the process has let go of them."""
        try:
            async with asyncio.timeout(LET_GO_SECONDS):
                await worker.channel.send(Cancel())
                while True:
                    message, _ = await worker.channel.receive()
                    if isinstance(message, End | Drawn | Refused | Fault) or getattr(message, "last", False):
                        break
            self._turns.free(worker, self._count)
        except (EOFError, ConnectionError, TimeoutError):
            await self._replace(worker, set(), patience=0.0)
        finally:
            self._release(granted)

    def _release(self, granted: set[int]) -> None:
        for slot in granted:
            self._arena.release(slot)
        granted.clear()

    async def _new(self) -> AsyncChild:
        worker = await AsyncChild.start(
            "serving.workers.decode_worker:main",
            "bridle-decode",
            self._begin,
            memory=self._arena.fd,
            understood=ToDecoder,
            allowed=FromDecoder,
            max_payload=MAX_PICTURE,
        )
        self._workers.add(worker)
        return worker

    async def _replace(self, worker: AsyncChild, granted: set[int], patience: float = 2.0) -> Exception:
        """What to tell the one whose file the process had; another process starts meanwhile, also where nobody waits
        for this any more. granted: slots that the process may write to until it has ended."""
        self._workers.discard(worker)
        code = await asyncio.shield(self._spawn(self._end(worker, granted, patience)))
        if code == -signal.SIGALRM:
            seconds = self._begin.seconds
            return TooLargeError(f"decoding took longer than decode_seconds = {seconds:g}; send a smaller file")
        if code == -signal.SIGPROF:
            seconds = self._begin.cpu_seconds
            return TooLargeError(f"decoding costs more than decode_cpu_seconds = {seconds:g}; send a simpler file")
        if code is not None and -code in CRASHES:
            return UndecodableError("the decoder crashed on the content; it is corrupt")
        return ProcessEndedError("the decoding process ended; send the request again")

    async def _end(self, worker: AsyncChild, granted: set[int], patience: float) -> int | None:
        """Ends a process and sees to another; its exit code."""
        code = await worker.end(patience)
        self._release(granted)
        if not self._closed:
            self._metrics.worker_restarts.labels("decode", self._name).inc()
            log("warning", "a decoding process ended; starting another", model=self._name, exit_code=code)
            self._spawn(self._restart(worker))
        return code

    async def _restart(self, ended: AsyncChild) -> None:
        """Another process in the place of one that ended, which counts as its last owner's until then: who has many
        ended one after another would else have all that are left."""
        pause = 0.1
        while not self._closed:
            try:
                worker = await self._new()
            except (OSError, RuntimeError, EOFError, TimeoutError) as error:
                log("error", "a decoding process does not start", model=self._name, error=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10.0)
            else:
                self._turns.drop(ended)
                self._turns.free(worker, self._count)
                return

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Ends all processes."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.end() for worker in self._workers), return_exceptions=True)
        self._workers.clear()


def _failure(message: Any) -> ClipError | EngineError:
    if isinstance(message, Refused):
        return clip_error(message.kind, message.message)
    if isinstance(message, Fault):
        return FaultError(message.message, message.traceback)
    return FaultError(f"a decoder sent {type(message).__name__} out of turn", "")
