"""The batcher by itself: what shares a batch, when it runs, what is dropped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine

import numpy as np
import pytest

from serving.engine import batching
from serving.engine.batching import Batcher, QueueEntry
from serving.engine.deployment import largest_batch
from serving.metrics import Metrics


class Bench:
    """A batcher with its surroundings in hand."""

    def __init__(self, max_batch: int = 4, max_wait: float = 30.0) -> None:
        self.decoding = 0
        self.released: list[int] = []
        self.metrics = Metrics()
        self.batcher = Batcher(
            "m",
            max_batch=max_batch,
            max_wait=max_wait,
            upstream=lambda: self.decoding,
            release=self.released.append,
            metrics=self.metrics,
        )

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"bridle_serve_{name}", {"model": "m"})

    def put(
        self, operation: str = "codes", *, slot: int | None = 0, seconds: float = 60.0, **more: object
    ) -> QueueEntry:
        entry = QueueEntry(operation, time.monotonic() + seconds, slot=slot, **more)  # type: ignore[arg-type]
        self.batcher.submit(entry)
        return entry


def in_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 200))

    run.__name__ = test.__name__
    return run


@in_loop
async def test_operations_never_share_a_batch_and_keep_their_order() -> None:
    bench = Bench()
    entries = [bench.put(operation) for operation in ("codes", "embed", "codes", "embed", "codes")]
    assert await bench.batcher.next_batch() == [entries[0], entries[2], entries[4]]
    assert await bench.batcher.next_batch() == [entries[1], entries[3]]


@in_loop
async def test_a_batch_is_no_larger_than_it_may_be() -> None:
    bench = Bench(max_batch=4)
    entries = [bench.put() for _ in range(6)]
    assert await bench.batcher.next_batch() == entries[:4]
    assert await bench.batcher.next_batch() == entries[4:]


@in_loop
async def test_codes_to_dequantize_run_alone() -> None:
    bench = Bench()
    entries = [bench.put("dequantize", slot=None, codes=np.zeros((1, 1), np.int64)) for _ in range(2)]
    assert [await bench.batcher.next_batch() for _ in range(2)] == [[one] for one in entries]


@in_loop
async def test_a_window_waits_for_those_being_decoded_and_no_longer_than_it_must() -> None:
    bench = Bench(max_batch=4)
    bench.decoding = 1
    first = bench.put()
    waiting = asyncio.create_task(bench.batcher.next_batch())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    second = bench.put()
    bench.decoding = 0
    bench.batcher.look()
    assert await waiting == [first, second]
    impatient = Bench(max_wait=0.05)
    impatient.decoding = 1
    began = time.monotonic()
    only = impatient.put()
    assert await impatient.batcher.next_batch() == [only]
    assert time.monotonic() - began >= 0.04
    full = Bench(max_batch=2)
    full.decoding = 5
    both = [full.put(), full.put()]
    assert await full.batcher.next_batch() == both


@in_loop
async def test_only_windows_of_one_operation_fill_a_batch() -> None:
    for operations, full in ((("codes", "embed"), False), (("embed", "codes"), False), (("codes",) * 3, True)):
        bench = Bench(max_batch=2)
        bench.decoding = 1
        entries = [bench.put(operation) for operation in operations]
        waiting = asyncio.create_task(bench.batcher.next_batch())
        await asyncio.sleep(0.02)
        assert waiting.done() == full
        bench.decoding = 0
        bench.batcher.look()
        assert await waiting == (entries[:2] if full else entries[:1])
        assert bench.batcher.more


@in_loop
async def test_the_window_that_came_first_decides_what_runs_and_when() -> None:
    bench = Bench(max_wait=50.0)
    bench.decoding = 1
    old = bench.put("codes", arrived=time.monotonic() - 60.0)
    new, other = bench.put("codes"), bench.put("embed")
    assert await bench.batcher.next_batch() == [old, new]
    waiting = asyncio.create_task(bench.batcher.next_batch())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    bench.decoding = 0
    bench.batcher.look()
    assert await waiting == [other]
    late = bench.put(arrived=time.monotonic() - 50.5)
    bench.decoding = 1
    waiting = asyncio.create_task(bench.batcher.next_batch())
    await asyncio.sleep(0)
    assert waiting.done() and waiting.result() == [late]


@in_loop
async def test_what_waits_is_measured() -> None:
    bench = Bench(max_batch=2)
    first, second, third = bench.put(), bench.put(), bench.put()
    late = bench.put(seconds=-1.0)
    await asyncio.sleep(0.05)
    assert await bench.batcher.next_batch() == [first, second]
    assert 0.04 < first.queue_seconds < 50
    assert late.future.done() and not third.future.done()
    assert bench.sample("queue_seconds_count") == 2
    assert bench.sample("queue_seconds_sum") == pytest.approx(first.queue_seconds + second.queue_seconds)
    assert (bench.sample("batch_size_count"), bench.sample("batch_size_sum")) == (1, 2)
    assert bench.sample("dropped_total") == 1
    assert (await bench.batcher.next_batch(), bench.batcher.more) == ([third], False)
    bench.decoding = 1
    assert bench.batcher.more


@in_loop
async def test_an_answer_is_given_once_and_its_slot_given_back_once() -> None:
    bench = Bench()
    entry = bench.put(slot=0)
    assert await bench.batcher.next_batch() == [entry]
    bench.batcher.finish(entry, ValueError("first"))
    bench.batcher.finish(entry, np.ones(1))
    assert bench.released == [0]
    with pytest.raises(ValueError, match="first"):
        await entry.future
    free = bench.put("dequantize", slot=None, codes=np.zeros((1, 1), np.int64))
    bench.batcher.finish(free, np.ones(1))
    assert bench.released == [0]


@in_loop
async def test_idle_processes_share_what_waits() -> None:
    bench = Bench(max_batch=8)
    waiting = [asyncio.create_task(bench.batcher.next_batch()) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(6):
        bench.put()
    first, second = await asyncio.gather(*waiting)
    assert sorted((len(first), len(second))) == [3, 3]
    waiting = [asyncio.create_task(bench.batcher.next_batch()) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(2):
        bench.put()
    assert [len(batch) for batch in await asyncio.gather(*waiting)] == [1, 1]


@in_loop
async def test_what_nobody_waits_for_is_dropped_and_its_slot_is_free() -> None:
    bench = Bench()
    gone, late, wanted = bench.put(slot=1), bench.put(slot=2, seconds=-1.0), bench.put(slot=3)
    gone.future.cancel()
    assert await bench.batcher.next_batch() == [wanted]
    assert bench.released == [1, 2]
    with pytest.raises(TimeoutError):
        await late.future
    bench.batcher.finish(wanted, np.ones(1))
    assert bench.released == [1, 2, 3]
    assert (await wanted.future).tolist() == [1.0]


@in_loop
async def test_a_deadline_is_the_first_moment_that_is_too_late() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching.time, "monotonic", lambda: 100.0)
        bench = Bench()
        late, wanted = bench.put(seconds=0.0), bench.put(seconds=0.1)
        assert await bench.batcher.next_batch() == [wanted]
        assert isinstance(late.future.exception(), TimeoutError)


@in_loop
async def test_pieces_of_one_request_are_told_apart_though_they_are_alike() -> None:
    bench = Bench()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching.time, "monotonic", lambda: 100.0)
        kept, gone = [bench.put("dequantize", slot=None, codes=np.zeros((2, 2), np.int64)) for _ in range(2)]
    gone.deadline = kept.deadline = time.monotonic() + 60
    gone.future.cancel()
    assert await bench.batcher.next_batch() == [kept]
    assert not bench.batcher.more


@in_loop
async def test_an_end_answers_all_that_wait() -> None:
    bench = Bench()
    entries = [bench.put(slot=i) for i in range(3)]
    bench.batcher.fail_all(lambda: ConnectionError("gone"))
    assert bench.released == [0, 1, 2]
    for entry in entries:
        with pytest.raises(ConnectionError):
            await entry.future
    assert not bench.batcher.more


@in_loop
async def test_few_windows_are_not_shared_out_where_a_batch_costs_more_than_they_do() -> None:
    bench = Bench(max_batch=8)
    bench.batcher.learn(least=4)
    waiting = [asyncio.create_task(bench.batcher.next_batch()) for _ in range(2)]
    await asyncio.sleep(0)
    entries = [bench.put() for _ in range(4)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result() for task in done] == [entries]
    for task in waiting:
        task.cancel()


def asking(bench: Bench, busy: list[bool]) -> asyncio.Task[list[QueueEntry]]:
    """A process that asks for a batch, and has another one under way while `busy` holds anything."""
    return asyncio.create_task(bench.batcher.next_batch(lambda: bool(busy)))


@in_loop
async def test_a_busy_process_gets_windows_when_a_batch_of_them_is_worth_it() -> None:
    bench = Bench(max_batch=8)
    bench.batcher.learn(least=3)
    waiting = asking(bench, [True])
    entries = [bench.put(), bench.put()]
    await asyncio.sleep(0.02)
    assert not waiting.done()
    entries.append(bench.put())
    assert await waiting == entries
    few = Bench(max_batch=2)
    few.batcher.learn(least=5)
    waiting = asking(few, [True])
    full = [few.put(), few.put()]
    assert await waiting == full


@in_loop
async def test_windows_too_few_for_a_busy_process_run_when_its_batch_is_answered() -> None:
    bench, busy = Bench(max_batch=8, max_wait=0.0), [True]
    bench.decoding = 1
    bench.batcher.learn(least=3)
    waiting = asking(bench, busy)
    only = bench.put()
    await asyncio.sleep(0.02)  # longer than a window may wait for others
    assert not waiting.done()
    busy.clear()
    bench.batcher.look()
    assert await waiting == [only]


@in_loop
async def test_a_busy_process_too_waits_for_windows_being_decoded() -> None:
    bench = Bench(max_batch=4)
    bench.decoding = 1
    waiting = asking(bench, [True])
    entries = [bench.put()]
    await asyncio.sleep(0.02)
    assert not waiting.done()
    entries += [bench.put() for _ in range(3)]
    assert await waiting == entries


@in_loop
async def test_a_busy_process_leaves_windows_to_an_idle_one_and_takes_what_that_leaves() -> None:
    bench = Bench(max_batch=2)
    busy = asking(bench, [True])
    await asyncio.sleep(0)
    idle = asking(bench, [])
    await asyncio.sleep(0)
    entries = [bench.put() for _ in range(4)]
    assert await idle == entries[:2]
    assert await busy == entries[2:]


@in_loop
async def test_codes_to_dequantize_gather_nobody_and_go_to_a_busy_process() -> None:
    bench = Bench(max_batch=8)
    bench.batcher.learn(least=5)
    waiting = asking(bench, [True])
    one = bench.put("dequantize", slot=None, codes=np.zeros((1, 1), np.int64))
    assert await waiting == [one]


def test_a_batch_has_so_many_clips_as_have_a_batchs_positions() -> None:
    assert [largest_batch(positions, ["cpu#0"]) for positions in (16, 196, 1000)] == [64, 8, 4]
    assert [largest_batch(positions, ["cuda:0#0"]) for positions in (196, 1000)] == [64, 16]
