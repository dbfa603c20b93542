"""One model being served: its decoding pool, its batcher and its model processes, which share one arena."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bridle.folder_config import ClassifierConfig, ModelConfig, is_classifier, read_classifier_config, read_config
from bridle.modalities import describe
from bridle.modalities.clip import Description
from bridle.processes.async_child import AsyncChild
from bridle.processes.messages import (
    VERSION,
    BeginDecoder,
    BeginModel,
    Dequantize,
    Fault,
    Forward,
    FromModel,
    ModelReady,
    ToModel,
    array_of,
)
from bridle.processes.messages import (
    Result as ModelResult,
)
from serving.engine.batching import Array, Batcher, QueueEntry
from serving.engine.cores import SharedCores
from serving.engine.decoding import DecodePool, Window
from serving.engine.errors import DeadlineError, EngineError, FaultError, ProcessEndedError
from serving.engine.turns import Turns
from serving.logs import log
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.workers.arena import Arena

MAX_ANSWER = 1 << 31
"""Bytes that a model process may answer with."""
OPERATIONS: dict[str, Literal["codes", "embed", "classify"]] = {
    "codes": "codes", "embed": "embed", "classify": "classify"
}  # fmt: skip
"""What a model process does with windows."""
BATCH_POSITIONS = {"cpu": 1600, "cuda": 16384}
"""Positions in a batch: beyond, a batch only takes longer. 8 pictures of ViT-S are 1,568."""
SMALLEST_BATCH, LARGEST_BATCH = 4, 64
MEASURED = 5
"""Forward passes of which the fastest tells what a clip costs."""
MEASURED_BATCH = 8
PIECE_NUMBERS = 1 << 18
"""Numbers of latents that one batch makes of codes: 1 MB, which the event loop copies in a third of
a millisecond."""


class Deployment:
    """A model or a classifier in service. Made by `start`, which returns when it is warm.

    name: what `model=` calls it, the settings' name or else the folder's own; info: what the model says about itself.
    """

    def __init__(
        self, folder: Path, settings: ServeSettings, metrics: Metrics, devices: list[str], alias: str | None = None
    ) -> None:
        self.folder = folder
        self.alias = alias
        self.config = config_of(folder)
        self.name = alias or self.config.name
        self.modality: Description = describe(self.config.modality, self.config.clip, settings.limits)
        self.info: dict[str, Any] = {}
        self.codes_depend_on_batch = False
        self.positions = math.prod(self.modality.grid.values())
        self._settings = settings
        self._metrics = metrics
        self._devices = devices
        sizes = zip(self.modality.grid.values(), self.modality.patch, strict=True)
        self._shape = [self.modality.channels, *(count * step for count, step in sizes)]
        self.max_batch = settings.max_batch or largest_batch(self.positions, devices)
        self._ahead = 2 * self.max_batch
        slots = settings.decoders + (len(devices) + 2) * self.max_batch
        self._embeddings = (self.positions, self.config.encoder.width)
        self.arena = Arena(slots, 4 * max(math.prod(self._shape), math.prod(self._embeddings)))
        self._batcher = Batcher(
            self.name,
            max_batch=self.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            upstream=lambda: self.pool.active,
            release=self.arena.release,
            metrics=metrics,
        )
        begin = self._begin_decoder()
        self.pool = DecodePool(
            self.name, begin, settings.decoders, settings.max_share, self.arena, metrics, self._batcher.look
        )
        self._dequantizing: Turns[int] = Turns(settings.max_share, range(len(devices)))
        self._cores = SharedCores(len(devices), settings.threads)
        self._children: dict[str, AsyncChild] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def start(self) -> Deployment:
        """Starts all processes, and returns when the model is warm.

        Raises:
            ModelError, ChildError, ConnectionError: it does not start; nothing is left behind.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.pool.start())
                for device in self._devices:
                    group.create_task(self._start_model(device))
        except BaseExceptionGroup as errors:
            await self.stop()
            raise errors.exceptions[0] from None
        self._learn(next(iter(self._children.values())))
        if self.codes_depend_on_batch:
            log("warning", "codes may depend on the batch at rounding's last bit on this device", model=self.name)
        await self._measure(next(iter(self._children.values())))
        self._loops = [asyncio.create_task(self._run(device)) for device in self._devices]
        return self

    async def _measure(self, child: AsyncChild) -> None:
        """Learns from one idle process what a clip costs by itself and in a batch, before there are requests."""

        async def seconds(clips: int, threads: int) -> float:
            took = []
            for _ in range(MEASURED):
                forward = Forward("codes", threads, list(range(clips)), [self.positions] * clips)
                await child.channel.send(forward)
                answer, _ = await child.channel.receive()
                took.append(answer.seconds if isinstance(answer, ModelResult) else math.inf)
            return min(took)

        alone = {threads: await seconds(1, threads) for threads in self._cores.counts}
        several = min(MEASURED_BATCH, self.max_batch)
        if several < 2 or math.inf in alone.values():
            return
        self._cores.learn(alone)
        least = self._cores.counts[-1]
        one, batch = alone[least], await seconds(several, least)
        each = max((batch - one) / (several - 1), one / several)
        self._batcher.learn(max(1, round((one - each) / each)))

    def _learn(self, child: AsyncChild) -> None:
        hello: ModelReady = child.hello
        if self.info and self.info["sha256"] != hello.info["sha256"]:
            log("warning", "the folder holds other weights than before", model=self.name)
        self.info = hello.info
        self.codes_depend_on_batch = hello.codes_depend_on_batch

    async def stop(self) -> None:
        """Ends all processes at once."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._batcher.fail_all(_gone)
        await asyncio.gather(self.pool.close(), *(child.end() for child in self._children.values()))
        self._children.clear()
        self.arena.close()

    async def retire(self) -> None:
        """Waits until nobody uses the deployment any more, then stops it. Who reads an answer that is made meanwhile
        longer than a request may take keeps no model alive."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.request_timeout):
                await self._unused.wait()
        await self.stop()

    @contextmanager
    def used(self) -> Iterator[Deployment]:
        """Keeps the deployment alive for one request."""
        self._users += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    @property
    def classifies(self) -> bool:
        """Whether it is a classifier, which gives classes and no codes."""
        return isinstance(self.config, ClassifierConfig)

    @property
    def model_config(self) -> ModelConfig:
        """The configuration of a model that is no classifier: `Registry` gives those to nobody who wants codes."""
        assert isinstance(self.config, ModelConfig)
        return self.config

    @property
    def devices(self) -> list[str]:
        """Where it runs, one entry a process."""
        return [device.partition("#")[0] for device in self._devices]

    @property
    def running(self) -> bool:
        """Whether a model process is up."""
        return bool(self._children)

    @property
    def pids(self) -> dict[str, list[int]]:
        """Process ids, by kind."""
        return {"model": [child.pid for child in self._children.values()], "decode": self.pool.pids}

    async def results(
        self, operation: str, data: bytes | bytearray, deadline: float
    ) -> AsyncGenerator[tuple[Window, Array, QueueEntry], None]:
        """A file's windows with the model's answers, in order, each as soon as it is there.

        Some windows are worked on ahead of the one that is awaited; when the receiver stops, so does all of it.

        Raises:
            ClipError: the file is at fault. EngineError: a process ended. TimeoutError: the deadline passed.
        """
        pending: deque[tuple[Window, QueueEntry]] = deque()
        windows = self.pool.windows(data)
        per_step = math.prod(list(self.modality.grid.values())[1:])
        try:
            async for window in windows:
                entry = QueueEntry(operation, deadline, slot=window.slot, valid=window.valid * per_step)
                pending.append((window, entry))
                self._batcher.submit(entry)
                while pending and (len(pending) >= self._ahead or pending[0][1].future.done()):
                    done, entry = pending.popleft()
                    yield done, await entry.future, entry
            while pending:
                done, entry = pending.popleft()
                yield done, await entry.future, entry
        finally:
            for _, entry in pending:
                entry.future.cancel()
            await windows.aclose()

    async def dequantize(self, codes: npt.NDArray[np.int64]) -> AsyncGenerator[Array, None]:
        """Codes ``[N, M']`` to latents: float32 ``[n, d]`` again and again, each made when it is asked for.

        Raises:
            EngineError: a process ended, or a piece took longer than a request may.
        """
        step = max(1, PIECE_NUMBERS // self.model_config.quantizer.dim)
        for start in range(0, len(codes), step):
            yield await self._latents(codes[start : start + step])

    async def _latents(self, codes: npt.NDArray[np.int64]) -> Array:
        longest = self._settings.request_timeout
        try:
            async with asyncio.timeout(longest), self._dequantizing.one(len(self._devices)):
                entry = QueueEntry("dequantize", time.monotonic() + longest, codes=codes)
                self._batcher.submit(entry)
                return await entry.future
        except TimeoutError:
            raise DeadlineError from None

    async def _run(self, device: str) -> None:
        """Feeds one model process for as long as the deployment lives, and replaces the process when it ends."""
        while True:
            batch = await self._batcher.next_batch()
            try:
                await self._run_batch(device, batch)
            except (EOFError, ConnectionError, TimeoutError) as error:
                hangs = isinstance(error, TimeoutError)
                try:  # first: until it has ended it may write embeddings into slots, which then are another request's
                    code = await self._children.pop(device).end(patience=0.0 if hangs else 2.0)
                finally:
                    for entry in batch:
                        self._batcher.finish(entry, _gone())
                if hangs:
                    log("error", "a batch took longer than model_seconds", model=self.name, device=device)
                await self._replace(device, code)
            except BaseException as error:
                for entry in batch:
                    self._batcher.finish(entry, _gone())
                if not isinstance(error, Exception):
                    raise
                log("error", "a batch failed", model=self.name, error=repr(error))

    async def _run_batch(self, device: str, batch: list[QueueEntry]) -> None:
        operation, codes = batch[0].operation, batch[0].codes
        threads = self._cores.take(self._batcher.more)
        try:
            channel = self._children[device].channel
            async with asyncio.timeout(self._settings.model_seconds):
                if codes is not None:
                    await channel.send(Dequantize(threads, list(codes.shape)), codes.data)
                else:
                    slots = [entry.slot for entry in batch if entry.slot is not None]
                    valid = [entry.valid for entry in batch if entry.slot is not None]
                    await channel.send(Forward(OPERATIONS[operation], threads, slots, valid))
                answer, payload = await channel.receive()
        finally:
            self._cores.give_back()
        if isinstance(answer, Fault):
            log("error", "a batch failed", model=self.name, error=answer.message)
            for entry in batch:
                error = _no_memory() if answer.memory else FaultError(answer.message, answer.traceback)
                self._batcher.finish(entry, error)
            return
        self._metrics.model_seconds.labels(self.name, operation).observe(answer.seconds)
        self._metrics.clips.labels(self.name, operation).inc(len(batch))
        found: Sequence[Array]
        if operation == "embed":
            width = self.config.encoder.width
            found = [self.arena.read(entry.slot, (entry.valid, width)) for entry in batch if entry.slot is not None]
        else:
            array = array_of(answer, payload)
            found = [array] if codes is not None else list(array)
        for entry, result in zip(batch, found, strict=True):
            entry.model_seconds = answer.seconds
            self._batcher.finish(entry, result)

    async def _replace(self, device: str, code: int | None) -> None:
        """What waits in the queue waits a little longer; only the batch that the process had has failed."""
        self._metrics.worker_restarts.labels("model", self.name).inc()
        log("error", "a model process ended; starting another", model=self.name, device=device, exit_code=code)
        pause = 0.2
        while True:
            try:
                await self._start_model(device)
                self._learn(self._children[device])
                return
            except (OSError, RuntimeError, EOFError, TimeoutError) as error:
                log("error", "a model process does not start", model=self.name, device=device, error=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)

    async def _start_model(self, device: str) -> None:
        settings = self._settings
        begin = BeginModel(
            version=VERSION,
            folder=str(self.folder.resolve()),
            device=device.partition("#")[0],
            dtype=settings.dtype,
            threads=self._cores.counts,
            compile=settings.compile,
            max_batch=self.max_batch,
            shape=self._shape,
            slot_bytes=self.arena.slot_bytes,
            log_level=settings.log_level,
        )
        self._children[device] = await AsyncChild.start(
            "serving.workers.model_worker:main",
            "bridle-model",
            begin,
            memory=self.arena.fd,
            understood=ToModel,
            allowed=FromModel,
            max_payload=MAX_ANSWER,
        )

    def _begin_decoder(self) -> BeginDecoder:
        settings = self._settings
        return BeginDecoder(
            version=VERSION,
            modality=self.config.modality,
            settings=self.modality.settings.model_dump(mode="json"),
            limits=self.modality.limits.model_dump(mode="json"),
            memory_bytes=settings.decode_memory_mb << 20,
            seconds=settings.decode_seconds,
            cpu_seconds=settings.decode_cpu_seconds,
            slot_bytes=self.arena.slot_bytes,
            log_level=settings.log_level,
        )


def config_of(folder: Path) -> ModelConfig | ClassifierConfig:
    """The configuration of a model folder or of a classifier folder.

    Raises:
        ModelError: it is neither, or of another version.
    """
    return read_classifier_config(folder) if is_classifier(folder) else read_config(folder)


def _gone() -> EngineError:
    return ProcessEndedError("the model process ended; send the request again")


def _no_memory() -> EngineError:
    return ProcessEndedError("the device has no memory for this batch; send the request again")


def largest_batch(positions: int, devices: Sequence[str]) -> int:
    """Clips of so many positions in one batch, where the settings leave it open."""
    room = min(BATCH_POSITIONS["cuda" if device.startswith("cuda") else "cpu"] for device in devices)
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, room // positions))
