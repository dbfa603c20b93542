"""From files to answers: choosing models, running windows, joining them, and stopping when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from bridle.modalities.clip import ClipError, WrongKindError
from bridle.modalities.joining import Place, joined
from serving.engine.batching import Array
from serving.engine.deployment import Deployment, all_used
from serving.engine.errors import AnswerTooLargeError, DeadlineError, FileError
from serving.engine.turns import aside

T = TypeVar("T")
MAX_NUMBERS = 64_000_000
"""Numbers in an answer of any kind."""
SMALL = 20_000
"""Numbers that are handled without leaving the event loop."""


@dataclass
class Timings:
    """Where a request's time went, summed over its windows, in seconds."""

    queue: float = 0.0
    model: float = 0.0
    windows: int = 0
    models: set[str] = field(default_factory=set)

    def header(self) -> str:
        """`Server-Timing`."""
        return f"queue;dur={self.queue * 1000:.1f}, model;dur={self.model * 1000:.1f}"


@dataclass(frozen=True)
class Result:
    """One window's answer, its padding cut.

    values: ``[n, M]`` codes, ``[n, D]`` embeddings, or ``[C]`` probabilities of classes.
    """

    deployment: Deployment
    place: Place
    values: Array

    @property
    def grid(self) -> dict[str, int]:
        """The window's own, its padding cut."""
        return joined([self.place]).grid


async def windows_of(
    candidates: Sequence[Deployment], operation: str, data: bytes | bytearray, deadline: float, timings: Timings
) -> AsyncGenerator[Result, None]:
    """A file's answers window by window, from the first candidate that takes this kind of content.

    Raises:
        ClipError: the file is at fault. EngineError: a process ended. TimeoutError: the deadline passed.
    """
    with all_used(candidates):
        for index, deployment in enumerate(candidates):
            began = False
            try:
                async with contextlib.aclosing(deployment.results(operation, data, deadline)) as results:
                    async for window, values, entry in results:
                        began = True
                        timings.queue += entry.queue_seconds
                        timings.model += entry.model_seconds
                        timings.windows += 1
                        timings.models.add(deployment.name)
                        place = Place(deployment.modality.grid, window.valid, window.start_s, window.duration_s)
                        yield Result(
                            deployment, place, values if operation == "classify" else values[: place.positions]
                        )
                return
            except WrongKindError:
                if began or index == len(candidates) - 1:
                    raise


@dataclass(frozen=True)
class FileResult:
    """A whole file's answer: values ``[N, M]`` or ``[N, D]`` over `grid`; ``[D]`` where they are pooled."""

    deployment: Deployment
    values: Array
    grid: dict[str, int]
    duration_s: float | None


async def whole(
    candidates: Sequence[Deployment],
    operation: str,
    data: bytes | bytearray,
    deadline: float,
    timings: Timings,
    hold: Callable[[int], None] = lambda _: None,
) -> FileResult:
    """A whole file's answer, joined as `bridle tokenize` joins it.

    hold: told the bytes of each window's answer, which stay in memory until the last is there; may refuse them.

    Raises:
        as `windows_of`; AnswerTooLargeError: an answer too large to hold.
    """
    places: list[Place] = []
    values: list[Array] = []
    numbers = 0
    async with contextlib.aclosing(windows_of(candidates, operation, data, deadline, timings)) as results:
        async for result in results:
            deployment = result.deployment
            numbers += result.values.size
            if numbers > MAX_NUMBERS:
                raise AnswerTooLargeError(f"the answer has more than {MAX_NUMBERS} numbers; ask for a pooled one")
            hold(result.values.nbytes)
            places.append(result.place)
            values.append(np.array(result.values))  # a copy: else its batch's whole answer would stay
    whole_values = values[0] if len(values) == 1 else await aside(partial(np.concatenate, values))
    extent = joined(places)
    return FileResult(deployment, whole_values, extent.grid, extent.duration_s)


async def pooled(
    candidates: Sequence[Deployment], operation: str, data: bytes | bytearray, deadline: float, timings: Timings
) -> FileResult:
    """The mean of a whole file's answers over its positions, float32 ``[D]``; a file of any length takes no more.

    Raises:
        as `windows_of`.
    """
    places: list[Place] = []
    total: Array = np.zeros(())
    async with contextlib.aclosing(windows_of(candidates, operation, data, deadline, timings)) as results:
        async for result in results:
            deployment = result.deployment
            total = total + result.values.sum(0, dtype=np.float64)
            places.append(result.place)
    extent = joined(places)
    mean = (total / sum(place.positions for place in places)).astype(np.float32)
    return FileResult(deployment, mean, extent.grid, extent.duration_s)


@dataclass(frozen=True)
class Classes:
    """A whole file's classes: values float64 ``[C]``, a probability of each."""

    deployment: Deployment
    values: Array
    duration_s: float | None


async def classified(
    candidates: Sequence[Deployment], data: bytes | bytearray, deadline: float, timings: Timings
) -> Classes:
    """A whole file's classes, the mean over its windows by content, as `bridle classify` takes it.

    Raises:
        as `windows_of`.
    """
    total: Array = np.zeros(())
    weight, seconds = 0, None
    async with contextlib.aclosing(windows_of(candidates, "classify", data, deadline, timings)) as results:
        async for result in results:
            deployment = result.deployment
            total = total + result.place.positions * result.values.astype(np.float64)
            weight += result.place.positions
            if result.place.duration_s is not None:
                seconds = (seconds or 0.0) + result.place.duration_s
    return Classes(deployment, total / weight, None if seconds is None else round(seconds, 6))


async def each_clip(work: Sequence[Awaitable[T]]) -> list[T]:
    """Runs a request's clips beside each other; the first that fails ends all, and the error says which it was.

    Raises:
        FileError: with the index of the one at fault. DeadlineError: it took too long.
    """

    async def one(index: int, job: Awaitable[T]) -> T:
        try:
            return await job
        except ClipError as error:
            raise FileError(index, error) from None
        except TimeoutError:
            raise DeadlineError from None

    if len(work) == 1:
        return [await one(0, work[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, job)) for index, job in enumerate(work)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
