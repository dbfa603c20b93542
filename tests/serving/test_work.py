"""From windows to a request's answers, by itself: models tried in order, windows joined, whose fault it was."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bridle.modalities.clip import UndecodableError, WrongKindError
from serving.engine import work
from serving.engine.errors import AnswerTooLargeError, DeadlineError, FileError
from serving.engine.work import FileResult, Timings, classified, each_clip, pooled, whole, windows_of


class Model:
    """Stands where a deployment does: of 4 x 2 positions a window, with the windows' answers given."""

    def __init__(self, name: str, windows: list[tuple[int, float | None]], error: Exception | None = None) -> None:
        """windows: steps of time that are content, and seconds; error: raised after them."""
        self.name = name
        self.windows = windows
        self.error = error
        self.modality = SimpleNamespace(grid={"time": 4, "frequency": 2})
        self.users = 0
        self.asked: list[tuple[str, bytes, float]] = []

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        self.users += 1
        yield
        self.users -= 1

    async def results(self, operation: str, data: bytes, deadline: float) -> AsyncGenerator[Any, None]:
        assert self.users == 1
        self.asked.append((operation, data, deadline))
        start = 0.0
        for number, (valid, seconds) in enumerate(self.windows):
            window = SimpleNamespace(valid=valid, start_s=start, duration_s=seconds)
            values = np.full((8, 3), number) if operation != "classify" else np.array([number, 1.0 - number])
            yield window, values, SimpleNamespace(queue_seconds=0.25, model_seconds=2.0)
            start += seconds or 0.0
        if self.error is not None:
            raise self.error


def joined(*models: Model, timings: Timings | None = None) -> FileResult:
    return asyncio.run(whole(models, "codes", b"file", 9.0, timings or Timings()))  # type: ignore[arg-type]


def test_a_mean_is_over_positions_and_any_number_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MAX_NUMBERS", 10)
    models = [Model("m", [(4, 1.0), (4, 1.0), (1, 0.25)])]
    found = asyncio.run(pooled(models, "embed", b"file", 9.0, Timings()))  # type: ignore[arg-type]
    assert (found.values.dtype, found.values.tolist()) == (np.float32, [np.float32(12 / 18)] * 3)
    assert (found.grid, found.duration_s) == ({"time": 9, "frequency": 2}, 2.25)


def test_windows_are_joined_in_order_without_their_padding_and_times_add_up() -> None:
    model, timings = Model("m", [(4, 1.0), (4, 1.0), (1, 0.25)]), Timings()
    found = joined(model, timings=timings)
    assert found.deployment is model  # type: ignore[comparison-overlap]
    assert found.values.tolist() == [[0] * 3] * 8 + [[1] * 3] * 8 + [[2] * 3] * 2
    assert (found.grid, found.duration_s) == ({"time": 9, "frequency": 2}, 2.25)
    assert (timings.queue, timings.model, timings.windows, timings.models) == (0.75, 6.0, 3, {"m"})
    assert timings.header() == "queue;dur=750.0, model;dur=6000.0"
    assert model.asked == [("codes", b"file", 9.0)]
    assert model.users == 0


def test_one_window_is_a_copy_of_its_own() -> None:
    found = joined(Model("m", [(2, None)]))
    assert found.values.base is None
    assert (found.values.shape, found.grid, found.duration_s) == ((4, 3), {"time": 2, "frequency": 2}, None)


def test_each_window_comes_with_its_place_and_its_own_grid() -> None:
    async def places() -> list[Any]:
        rows = windows_of([Model("m", [(4, 1.0), (3, 0.75)])], "embed", b"", 1.0, Timings())  # type: ignore[list-item]
        return [(row.grid, row.place.start_s, row.place.duration_s, len(row.values)) async for row in rows]

    first, last = asyncio.run(places())
    assert first == ({"time": 4, "frequency": 2}, 0.0, 1.0, 8)
    assert last == ({"time": 3, "frequency": 2}, 1.0, 0.75, 6)


def test_the_next_model_is_tried_where_one_does_not_take_the_kind() -> None:
    first, second = Model("film", [], WrongKindError("no picture")), Model("sound", [(1, 1.0)])
    timings = Timings()
    assert joined(first, second, timings=timings).deployment is second  # type: ignore[comparison-overlap]
    assert timings.models == {"sound"}
    with pytest.raises(WrongKindError, match="no picture"):
        joined(Model("film", [], WrongKindError("no picture")))
    with pytest.raises(WrongKindError, match="half way"):  # an answer has begun: no other model may go on with it
        joined(Model("film", [(1, 1.0)], WrongKindError("half way")), Model("sound", [(1, 1.0)]))
    with pytest.raises(UndecodableError):
        joined(Model("film", [], UndecodableError("broken")), second)
    taken, other = Model("sound", [(1, 1.0)]), Model("other", [(1, 1.0)])
    assert len(joined(taken, other).values) == 2
    assert other.asked == []


def test_an_answer_of_too_many_numbers_is_refused_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MAX_NUMBERS", 48)
    assert len(joined(Model("m", [(4, 1.0), (4, 1.0)])).values) == 16
    with pytest.raises(AnswerTooLargeError, match="more than 48 numbers"):
        joined(Model("m", [(4, 1.0), (4, 1.0), (1, 1.0)]))
    monkeypatch.setattr(work, "MAX_NUMBERS", 47)
    with pytest.raises(AnswerTooLargeError, match="more than 47 numbers"):
        joined(Model("m", [(4, 1.0), (4, 1.0)]))


def test_classes_are_the_mean_over_content() -> None:
    def classes(*windows: tuple[int, float | None]) -> work.Classes:
        return asyncio.run(classified([Model("m", list(windows))], b"", 1.0, Timings()))  # type: ignore[list-item]

    found = classes((4, 1.0), (1, 0.3333333))
    assert found.values.tolist() == pytest.approx([0.2, 0.8])
    assert found.duration_s == 1.333333
    assert classes((4, None)).duration_s is None
    assert classes((4, 0.0)).duration_s == 0.0


async def fails(error: Exception, after: float = 0.0) -> int:
    await asyncio.sleep(after)
    raise error


async def gives(value: int, after: float = 0.0) -> int:
    await asyncio.sleep(after)
    return value


def test_clips_run_beside_each_other_and_answers_keep_their_order() -> None:
    assert asyncio.run(each_clip([gives(1, 0.02), gives(2), gives(3, 0.01)])) == [1, 2, 3]
    assert asyncio.run(each_clip([gives(5)])) == [5]


@pytest.mark.parametrize("many", [False, True])
def test_the_first_that_fails_ends_all_and_says_which_it_was(many: bool) -> None:
    ended = []

    async def endless() -> int:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        return 0

    def run(error: Exception) -> list[int]:
        async def both() -> list[int]:
            return await each_clip([endless(), fails(error, 0.01)] if many else [fails(error)])

        return asyncio.run(both())

    with pytest.raises(FileError, match="broken") as found:
        run(UndecodableError("broken"))
    assert found.value.index == int(many)
    assert isinstance(found.value.cause, UndecodableError)
    assert ended == [True] * many
    with pytest.raises(DeadlineError):
        run(TimeoutError("late"))
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    assert ended == [True] * (3 * many)


def test_what_ended_all_is_told_and_not_what_broke_because_of_it() -> None:
    async def breaks_when_it_is_stopped() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise UndecodableError("stopped half way") from None
        return 0

    async def both() -> list[int]:
        return await each_clip([breaks_when_it_is_stopped(), fails(UndecodableError("broken"), 0.01)])

    with pytest.raises(FileError, match="broken") as found:
        asyncio.run(both())
    assert found.value.index == 1
