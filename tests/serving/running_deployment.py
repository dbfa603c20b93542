"""A model in service without HTTP: its real processes, and the event loop in hand."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.engine.batching import Array
from serving.engine.deployment import Deployment
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.workers.template import start_workers_template


class Service:
    """A model in service, without HTTP."""

    def __init__(self, runner: asyncio.Runner, folder: Path, **settings: Any) -> None:
        start_workers_template()
        chosen = {"device": ("cpu",), "decode_workers": 2, "threads": 1, "batches_under_way": 2, "max_batch": 1}
        self.metrics = Metrics()
        self.settings = ServeSettings(models=(str(folder),), **{**chosen, **settings})  # type: ignore[arg-type]
        self.runner = runner
        self.deployment = runner.run(self._start(folder))

    async def _start(self, folder: Path) -> Deployment:
        devices = [f"{name}#{i}" for i, name in enumerate(self.settings.device)]
        return await Deployment(folder, self.settings, self.metrics, devices).start()

    @property
    def pid(self) -> int:
        (pid,) = self.deployment.pids["model"]
        return pid

    @property
    def batches(self) -> float:
        """Batches that were sent."""
        labels = {"model": self.deployment.name}
        return self.metrics.registry.get_sample_value("bridle_serve_batch_size_count", labels) or 0.0

    async def ask(self, operation: str, data: bytes, seconds: float = 300.0) -> Array:
        """The answer to a file, its windows one after another."""
        found = self.deployment.results(operation, data, time.monotonic() + seconds)
        return np.concatenate([values[: len(values)] async for _, values, _ in found])

    async def dequantize(self, code: int = 0) -> Array:
        """A batch of its own."""
        codes = np.full((5, 4), code, np.int64)
        return np.concatenate([part async for part in self.deployment.dequantize(codes)])

    @contextmanager
    def stopped(self) -> Iterator[int]:
        """Stops the model process, which then answers nothing."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)

    async def under_way(self, asked: list[Coroutine[Any, Any, Array]]) -> list[asyncio.Task[Array]]:
        """Asks; returns when two batches have been sent and what comes after them waits."""
        before = self.batches
        tasks = []
        for number, one in enumerate(asked):
            tasks.append(asyncio.create_task(one))
            sent = before + min(number + 1, 2)
            await eventually("it is sent", partial(lambda sent: self.batches == sent, sent))
        return tasks

    async def at_rest(self) -> None:
        """Returns when every slot has come back."""
        await eventually("all slots come back", lambda: self.deployment.arena.free == self.deployment.arena.slots)


async def eventually(what: str, check: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not check():
        assert time.monotonic() < end, f"not within five minutes: {what}"
        await asyncio.sleep(0.01)


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Service]:
    with asyncio.Runner() as runner:
        service = Service(runner, folder, **settings)
        try:
            yield service
        finally:
            runner.run(service.deployment.stop())
