"""The pool of decoding processes by itself, with real ones."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

from bridle.modalities import describe
from bridle.modalities.clip import Limits
from bridle.processes.messages import VERSION, BeginDecoder
from serving.engine.decoding import DecodePool, Window
from serving.metrics import Metrics
from serving.workers.arena import Arena


def test_who_leaves_while_waiting_for_a_slot_costs_no_process(pictures: list[bytes]) -> None:
    async def pids() -> tuple[list[int], list[int]]:
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
            async with aclosing(pool.windows(pictures[0])) as windows:
                return await anext(windows)

        await pool.start()
        try:
            before, held = pool.pids, await arena.acquire()
            waiting = asyncio.create_task(first())
            for _ in range(10):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            arena.release(held)
            arena.release((await first()).slot)
            return before, pool.pids
        finally:
            await pool.close()
            arena.close()

    before, after = asyncio.run(pids())
    assert before == after


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
