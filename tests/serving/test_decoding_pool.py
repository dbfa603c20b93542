"""The pool of decoding processes by itself, with real ones."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from bridle.modalities import describe
from bridle.modalities.clip import Limits
from bridle.processes.async_child import AsyncChild
from bridle.processes.messages import VERSION, BeginDecoder
from serving.engine.decoding import DecodePool, Window
from serving.metrics import Metrics
from serving.workers.arena import Arena


@asynccontextmanager
async def running(picture: bytes) -> AsyncIterator[tuple[DecodePool, Arena, Callable[[], Awaitable[Window]]]]:
    """A pool of one process, its one slot, and what decodes the picture."""
    described, arena = describe("image", {"size": [64, 64]}, Limits()), Arena(1, 4 * 3 * 64 * 64)
    begin = BeginDecoder(
        version=VERSION,
        modality="image",
        settings=described.settings.model_dump(mode="json"),
        limits=described.limits.model_dump(mode="json"),
        memory_bytes=2 << 30,
        seconds=300.0,
        cpu_seconds=60.0,
        slot_bytes=arena.slot_bytes,
        log_level="error",
    )
    pool = DecodePool("m", begin, 1, 0.5, arena, Metrics(), lambda: None)

    async def first() -> Window:
        async with aclosing(pool.windows(picture)) as windows:
            return await anext(windows)

    await pool.start()
    try:
        yield pool, arena, first
    finally:
        await pool.close()
        arena.close()


def test_who_leaves_while_waiting_for_a_slot_costs_no_process(pictures: list[bytes]) -> None:
    async def pids() -> tuple[list[int], list[int]]:
        async with running(pictures[0]) as (pool, arena, first):
            before, held = pool.pids, await arena.acquire()
            waiting = asyncio.ensure_future(first())
            for _ in range(10):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            arena.release(held)
            arena.release((await first()).slot)
            return before, pool.pids

    before, after = asyncio.run(pids())
    assert before == after


def test_who_leaves_while_a_process_ends_costs_the_pool_none(
    pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def again() -> bool:
        may_end, end = asyncio.Event(), AsyncChild.end

        async def slow(child: AsyncChild, patience: float = 2.0) -> int | None:
            await may_end.wait()
            return await end(child, patience)

        monkeypatch.setattr(AsyncChild, "end", slow)
        async with running(pictures[0]) as (pool, arena, first):
            try:
                os.kill(pool.pids[0], signal.SIGSTOP)  # it has the file, and no answer
                waiting = asyncio.ensure_future(first())
                while arena.free:
                    await asyncio.sleep(0)
                os.kill(pool.pids[0], signal.SIGKILL)
                while pool.pids:
                    await asyncio.sleep(0.01)
                waiting.cancel()
                await asyncio.wait({waiting})
                assert not arena.free  # the process may still write there
            finally:
                may_end.set()
            async with asyncio.timeout(120):
                arena.release((await first()).slot)
            return arena.free == 1

    assert asyncio.run(again())


def test_an_arena_that_is_closed_holds_no_memory() -> None:
    def held() -> tuple[int, int]:
        mapped = Path("/proc/self/maps").read_text().count("bridle-clips")
        opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return mapped, sum("bridle-clips" in str(target) for target in opened)

    before, arena = held(), Arena(4, 1 << 20)
    assert held() > before
    arena.close()
    assert held() == before
    del arena
