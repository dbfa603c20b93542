"""One model process: the batches that it has under way, and another process in its place when it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from bridle.processes.async_child import AsyncChild
from bridle.processes.messages import (
    BeginModel,
    Dequantize,
    Fault,
    Forward,
    FromModel,
    ModelReady,
    Result,
    ToModel,
    array_of,
)
from serving.engine.batching import Array, Batcher, QueueEntry
from serving.engine.cores import SharedCores
from serving.engine.errors import EngineError, FaultError, ProcessEndedError
from serving.logs import log
from serving.metrics import Metrics
from serving.workers.arena import Arena

MAX_ANSWER = 1 << 31
"""Bytes that a model process may answer with."""
OPERATIONS: dict[str, Literal["codes", "embed", "classify"]] = {
    "codes": "codes", "embed": "embed", "classify": "classify"
}  # fmt: skip
"""What a model process does with windows."""


class ModelProcess:
    """Sends one process its batches while it has room for more, and takes its answers, which come in their order.

    Args:
        model: its name, and device: its name, for log and metrics.
        begin: what a process starts with, now.
        room: batches that it may have under way.
        seconds: that a batch may take, from its sending or, where that was later, from the answer before it.
        width: numbers of a position's embedding.
        learn: is told what each process says of itself.
    """

    def __init__(
        self,
        model: str,
        device: str,
        begin: Callable[[], BeginModel],
        *,
        room: int,
        seconds: float,
        width: int,
        batcher: Batcher,
        arena: Arena,
        cores: SharedCores,
        metrics: Metrics,
        learn: Callable[[ModelReady], None],
    ) -> None:
        self._model = model
        self._begin = begin
        self._room = room
        self._seconds = seconds
        self._width = width
        self._batcher = batcher
        self._arena = arena
        self._cores = cores
        self._metrics = metrics
        self._learn = learn
        self._told = {"model": model, "device": device}
        self._child: AsyncChild | None = None
        self._under_way: deque[list[QueueEntry]] = deque()
        self._answered = asyncio.Event()
        self._patience = asyncio.timeout(None)

    @property
    def pid(self) -> int | None:
        """Process id; none while another process is being started."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Returns when the model is warm.

        Raises:
            ChildError, ConnectionError, OSError: it does not start.
        """
        self._child = await AsyncChild.start(
            "serving.workers.model_worker:main",
            "bridle-model",
            self._begin(),
            memory=self._arena.fd,
            understood=ToModel,
            allowed=FromModel,
            max_payload=MAX_ANSWER,
        )
        self._learn(self._child.hello)

    async def end(self, patience: float = 2.0) -> int | None:
        """Ends the process; its exit code."""
        child, self._child = self._child, None
        return await child.end(patience) if child else None

    async def ask(self, message: Forward) -> Result | Fault:
        """The answer to one batch. Only before `run`.

        Raises:
            EOFError, ConnectionError: the process ended.
        """
        assert self._child is not None
        await self._child.channel.send(message)
        answer: Result | Fault = (await self._child.channel.receive())[0]
        return answer

    async def run(self) -> None:
        """Feeds the process until this is cancelled; when it ends or hangs its batches fail, and it is replaced."""
        while True:
            try:
                async with asyncio.timeout(None) as self._patience, asyncio.TaskGroup() as group:
                    group.create_task(self._feed())
                    group.create_task(self._listen())
            # It ends before its batches do: it may write embeddings into slots, which then are another request's.
            except TimeoutError:
                log("error", "a batch took longer than model_seconds", **self._told)
                code = await self.end(patience=0.0)
            except ExceptionGroup as error:
                if unexpected := error.split((EOFError, ConnectionError))[1]:
                    log("error", "a model process could not be fed", error=repr(unexpected), **self._told)
                code = await self.end()
            finally:
                while self._under_way:
                    self._settle([gone() for _ in self._under_way[0]])
            await self._replace(code)

    async def _feed(self) -> None:
        while True:
            while len(self._under_way) >= self._room:
                self._answered.clear()
                await self._answered.wait()
            batch = await self._batcher.next_batch(lambda: bool(self._under_way))
            self._under_way.append(batch)
            threads = self._cores.take(self._batcher.more)
            if len(self._under_way) == 1:
                self._be_patient()
            await self._send(batch, threads)

    async def _send(self, batch: list[QueueEntry], threads: int) -> None:
        assert self._child is not None
        if (codes := batch[0].codes) is not None:
            await self._child.channel.send(Dequantize(threads, list(codes.shape)), codes.data)
            return
        slots = [entry.slot for entry in batch if entry.slot is not None]
        valid = [entry.valid for entry in batch if entry.slot is not None]
        await self._child.channel.send(Forward(OPERATIONS[batch[0].operation], threads, slots, valid))

    async def _listen(self) -> None:
        assert self._child is not None
        while True:
            answer, payload = await self._child.channel.receive()
            if not self._under_way:
                raise ConnectionError("an answer that nobody asked for")
            batch = self._under_way[0]
            try:
                found = self._found(batch, answer, payload)
            except Exception as error:
                log("error", "a batch failed", model=self._model, error=repr(error))
                found = [gone() for _ in batch]
            self._settle(found)
            self._be_patient()
            self._answered.set()
            self._batcher.look()

    def _found(self, batch: list[QueueEntry], answer: Result | Fault, payload: bytes) -> Sequence[Array | EngineError]:
        if isinstance(answer, Fault):
            log("error", "a batch failed", model=self._model, error=answer.message)
            return [_no_memory() if answer.memory else FaultError(answer.message, answer.traceback) for _ in batch]
        operation = batch[0].operation
        self._metrics.model_seconds.labels(self._model, operation).observe(answer.seconds)
        self._metrics.clips.labels(self._model, operation).inc(len(batch))
        for entry in batch:
            entry.model_seconds = answer.seconds
        if operation == "embed":
            read, width = self._arena.read, self._width
            return [read(entry.slot, (entry.valid, width)) for entry in batch if entry.slot is not None]
        array = array_of(answer, payload)
        return [array] if batch[0].codes is not None else list(array)

    def _settle(self, found: Sequence[Array | EngineError]) -> None:
        """Answers the oldest batch."""
        self._cores.give_back()
        for entry, result in zip(self._under_way.popleft(), found, strict=True):
            self._batcher.finish(entry, result)

    def _be_patient(self) -> None:
        """Gives the oldest batch its time."""
        now = asyncio.get_running_loop().time()
        if not self._patience.expired():
            self._patience.reschedule(now + self._seconds if self._under_way else None)

    async def _replace(self, code: int | None) -> None:
        """What waits in the queue waits a little longer."""
        self._metrics.worker_restarts.labels("model", self._model).inc()
        log("error", "a model process ended; starting another", exit_code=code, **self._told)
        pause = 0.2
        while True:
            try:
                return await self.start()
            except (OSError, RuntimeError, EOFError, TimeoutError) as error:
                log("error", "a model process does not start", error=str(error), **self._told)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)


def gone() -> EngineError:
    """What to tell those whose process ended."""
    return ProcessEndedError("the model process ended; send the request again")


def _no_memory() -> EngineError:
    return ProcessEndedError("the device has no memory for this batch; send the request again")
