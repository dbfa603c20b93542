"""One model being served: its decoding pool, its batcher and its model processes, which share one arena."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bridle.folder_config import ClassifierConfig, ModelConfig, is_classifier, read_classifier_config, read_config
from bridle.modalities import describe
from bridle.modalities.clip import Description
from bridle.processes.messages import VERSION, BeginDecoder, BeginModel, Forward, ModelReady, Result
from serving.engine.batching import Array, Batcher, QueueEntry
from serving.engine.cores import SharedCores
from serving.engine.decoding import DecodePool, Window
from serving.engine.errors import DeadlineError
from serving.engine.model_process import ModelProcess, gone
from serving.engine.turns import Turns
from serving.logs import log
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.workers.arena import Arena

BATCH_POSITIONS = {"cpu": 1600, "cuda": 16384}
"""Positions in a batch: beyond, a batch only takes longer. 8 pictures of ViT-S are 1,568."""
SMALLEST_BATCH, LARGEST_BATCH = 4, 64
MEASURED = 5
"""Forward passes of which the fastest tells what a clip costs."""
MEASURED_BATCH = {"cpu": 8, "cuda": 64}
"""Clips in the batch that is measured: to a GPU a few clips are as quick as one, which says nothing of more."""
BATCHES_UNDER_WAY = {"cpu": 1, "cuda": 2}
"""On a GPU one is received and copied while another is computed; on the CPU they would fight for the cores."""
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
        self._room = settings.batches_under_way or BATCHES_UNDER_WAY[kind_of(devices)]
        self._ahead = (1 + self._room) * self.max_batch
        slots = settings.decoders + (self._room * len(devices) + 2) * self.max_batch
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
        self._dequantizing: Turns[int] = Turns(settings.max_share, range(self._room * len(devices)))
        self._cores = SharedCores(len(devices), settings.threads)
        self._processes = [self._model_process(device) for device in devices]
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
                for process in self._processes:
                    group.create_task(process.start())
        except BaseExceptionGroup as errors:
            await self.stop()
            raise errors.exceptions[0] from None
        if self.codes_depend_on_batch:
            log("warning", "codes may depend on the batch at rounding's last bit on this device", model=self.name)
        await self._measure(self._processes[0])
        self._loops = [asyncio.create_task(process.run()) for process in self._processes]
        return self

    async def _measure(self, process: ModelProcess) -> None:
        """Learns from one idle process what a clip costs by itself and in a batch, before there are requests."""

        async def seconds(clips: int, threads: int) -> float:
            took = []
            for _ in range(MEASURED):
                answer = await process.ask(Forward("codes", threads, list(range(clips)), [self.positions] * clips))
                took.append(answer.seconds if isinstance(answer, Result) else math.inf)
            return min(took)

        alone = {threads: await seconds(1, threads) for threads in self._cores.counts}
        several = min(MEASURED_BATCH[kind_of(self._devices)], self.max_batch)
        if several < 2 or math.inf in alone.values():
            return
        self._cores.learn(alone)
        least = self._cores.counts[-1]
        one, batch = alone[least], await seconds(several, least)
        each = max((batch - one) / (several - 1), one / several)
        self._batcher.learn(max(1, round((one - each) / each)))

    def _learn(self, hello: ModelReady) -> None:
        if self.info and self.info["sha256"] != hello.info["sha256"]:
            log("warning", "the folder holds other weights than before", model=self.name)
        self.info = hello.info
        self.codes_depend_on_batch = hello.codes_depend_on_batch

    async def stop(self) -> None:
        """Ends all processes at once."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._batcher.fail_all(gone)
        await asyncio.gather(self.pool.close(), *(process.end() for process in self._processes))
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
        return bool(self.pids["model"])

    @property
    def pids(self) -> dict[str, list[int]]:
        """Process ids, by kind."""
        up = [process.pid for process in self._processes if process.pid is not None]
        return {"model": up, "decode": self.pool.pids}

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
            async with asyncio.timeout(longest), self._dequantizing.one(self._room * len(self._devices)):
                entry = QueueEntry("dequantize", time.monotonic() + longest, codes=codes)
                self._batcher.submit(entry)
                return await entry.future
        except TimeoutError:
            raise DeadlineError from None

    def _model_process(self, device: str) -> ModelProcess:
        return ModelProcess(
            self.name,
            device,
            partial(self._begin_model, device),
            room=self._room,
            seconds=self._settings.model_seconds,
            width=self.config.encoder.width,
            batcher=self._batcher,
            arena=self.arena,
            cores=self._cores,
            metrics=self._metrics,
            learn=self._learn,
        )

    def _begin_model(self, device: str) -> BeginModel:
        settings = self._settings
        return BeginModel(
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


@contextmanager
def all_used(models: Iterable[Deployment]) -> Iterator[None]:
    """Keeps several alive for one request: those, too, that it may come to later."""
    with contextlib.ExitStack() as held:
        for model in models:
            held.enter_context(model.used())
        yield


def config_of(folder: Path) -> ModelConfig | ClassifierConfig:
    """The configuration of a model folder or of a classifier folder.

    Raises:
        ModelError: it is neither, or of another version.
    """
    return read_classifier_config(folder) if is_classifier(folder) else read_config(folder)


def kind_of(devices: Sequence[str]) -> Literal["cpu", "cuda"]:
    """What all of a model's devices can do: CUDA only where each of them can."""
    return "cuda" if all(device.startswith("cuda") for device in devices) else "cpu"


def largest_batch(positions: int, devices: Sequence[str]) -> int:
    """Clips of so many positions in one batch, where the settings leave it open."""
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, BATCH_POSITIONS[kind_of(devices)] // positions))
