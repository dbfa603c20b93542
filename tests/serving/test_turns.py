"""Turns by themselves: who gets a worker next, and how many while others are about."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Coroutine

import pytest

from serving.engine import turns
from serving.engine.turns import OWNER, Turns, aside, in_turn


def in_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 200))

    run.__name__ = test.__name__
    return run


class Bench:
    """So many workers, called 0, 1, ...; `order` tells who got one, in order."""

    def __init__(self, count: int, share: float = 0.5) -> None:
        self.count = count
        self.turns: Turns[int] = Turns(share)
        self.order: list[str] = []
        for worker in range(count):
            self.turns.free(worker, count)

    def asks(self, owner: str) -> asyncio.Task[int]:
        async def take() -> int:
            OWNER.set(owner)
            worker = await self.turns.take(self.count)
            self.order.append(owner)
            return worker

        return asyncio.create_task(take())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@in_loop
async def test_one_owner_alone_gets_all_workers() -> None:
    bench = Bench(4)
    tasks = [bench.asks("a") for _ in range(6)]
    await settle()
    assert [task.done() for task in tasks] == [True] * 4 + [False] * 2
    bench.turns.free(tasks[1].result(), 4)
    assert await tasks[4] == tasks[1].result()
    assert not tasks[5].done()


@in_loop
async def test_while_others_are_about_none_has_more_than_its_share() -> None:
    bench = Bench(4)
    other = bench.asks("b")
    bench.turns.free(await other, 4)
    greedy = [bench.asks("a") for _ in range(5)]
    await settle()
    assert sum(task.done() for task in greedy) == 2
    late = bench.asks("b")
    await settle()
    assert late.done()  # a worker was kept for it
    assert sum(task.done() for task in greedy) == 2
    bench.turns.free(greedy[0].result(), 4)
    await settle()
    assert sum(task.done() for task in greedy) == 3


@in_loop
async def test_owners_have_their_turns_whoever_came_first() -> None:
    bench = Bench(1)
    first = bench.asks("a")
    await settle()
    waiting = [bench.asks(owner) for owner in ("a", "a", "a", "b", "c", "b")]
    await settle()
    assert bench.order == ["a"]
    worker = await first
    for _ in waiting:
        bench.turns.free(worker, 1)
        await settle()
    assert bench.order == ["a", "a", "b", "c", "a", "b", "a"]


@in_loop
async def test_who_is_gone_takes_none_and_gives_back_what_it_was_given() -> None:
    bench = Bench(1)
    worker = await bench.asks("a")
    gone, wanted = bench.asks("a"), bench.asks("b")
    await settle()
    gone.cancel()
    await settle()
    bench.turns.free(worker, 1)
    assert await wanted == worker
    late = bench.asks("a")
    await settle()
    bench.turns.free(worker, 1)  # it is given to the one who leaves at this moment
    late.cancel()
    await settle()
    assert gone.cancelled() and late.cancelled()
    assert await bench.asks("c") == worker
    leaves, stays, last = bench.asks("a"), bench.asks("a"), bench.asks("a")
    await settle()
    leaves.cancel()
    await settle()
    bench.turns.free(worker, 1)
    assert await stays == worker
    bench.turns.free(worker, 1)
    assert await last == worker


@in_loop
async def test_a_worker_that_died_counts_for_nobody_and_another_takes_its_place() -> None:
    bench = Bench(2)
    bench.turns.free(await bench.asks("b"), 2)
    dead = await bench.asks("a")
    waiting = bench.asks("a")
    await settle()
    assert not waiting.done()  # its share is one of two
    bench.turns.drop(dead)
    bench.turns.free(7, 2)
    assert await waiting in (0, 1, 7)


@in_loop
async def test_who_asked_long_ago_is_not_about() -> None:
    bench = Bench(2)
    now = 100.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns.time, "monotonic", lambda: now)
        bench.turns.free(await bench.asks("b"), 2)
        now = 109.9
        first, second = bench.asks("a"), bench.asks("a")
        await settle()
        assert (first.done(), second.done()) == (True, False)
        now = 110.0
        bench.turns.free(first.result(), 2)
        third = bench.asks("a")
        await settle()
        assert second.done() and third.done()


class Owner(str):
    """A name that can be watched: strings cannot."""

    __slots__ = ("__weakref__",)


@in_loop
async def test_of_an_owner_who_is_long_gone_nothing_is_kept() -> None:
    turns_of_two: Turns[int] = Turns(0.5)
    now = 100.0

    async def asks(owner: Owner) -> None:
        OWNER.set(owner)
        turns_of_two.free(await turns_of_two.take(2), 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns.time, "monotonic", lambda: now)
        turns_of_two.free(0, 2)
        regular, once = Owner("a regular"), Owner("once")
        gone = weakref.ref(once)
        for second, owner in ((100.0, regular), (101.0, once), (109.0, regular), (112.0, regular)):
            now = second
            await asyncio.create_task(asks(owner))
        del once
        await settle()
        assert gone() is None


@in_loop
async def test_work_aside_is_two_at_a_time_and_fails_as_it_does() -> None:
    running = most = 0
    lock = threading.Lock()

    def work() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return 5

    assert await asyncio.gather(*(aside(work) for _ in range(9))) == [5] * 9
    assert most == turns.SEATS == 2
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await aside(lambda: 1 // 0)
    assert await aside(lambda: "still") == "still"


@in_loop
async def test_of_all_who_keep_the_loop_one_does_in_each_of_its_rounds() -> None:
    """However many there are, what else is ready waits for one of them."""
    rounds, kept = 0, list[tuple[int, str]]()

    async def others() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def busy(owner: str, times: int) -> None:
        OWNER.set(owner)
        for _ in range(times):
            await in_turn()
            kept.append((rounds, owner))

    beside = asyncio.create_task(others())
    await asyncio.gather(*(busy("a", 5) for _ in range(4)), busy("b", 5))
    beside.cancel()
    when = [at for at, _ in kept]
    assert len(when) == 25 and len(set(when)) == 25
    assert "".join(owner for _, owner in kept[:10]).count("b") >= 4  # owners in turn, not requests


@in_loop
async def test_who_waits_for_a_moment_and_leaves_keeps_none() -> None:
    tasks = [asyncio.create_task(in_turn()) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks[1:]:
        task.cancel()
    await in_turn()


@in_loop
async def test_work_aside_keeps_a_seat_for_another_owner_who_is_about() -> None:
    may_end, begun = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        begun.release()
        may_end.wait(20)

    def asks(owner: str, what: Callable[[], None]) -> asyncio.Task[None]:
        async def run() -> None:
            OWNER.set(owner)
            await aside(what)

        return asyncio.create_task(run())

    await asks("other", lambda: None)
    greedy = [asks("greedy", work) for _ in range(3)]
    await asyncio.to_thread(begun.acquire)
    await settle()
    await asks("other", lambda: None)  # there is a seat, though greedy ones came first
    assert not begun.acquire(blocking=False)
    may_end.set()
    await asyncio.gather(*greedy)
