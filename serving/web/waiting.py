"""Work lasts as long as somebody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from serving.engine.errors import DeadlineError
from serving.web.problems import ClientGoneError

T = TypeVar("T")


async def while_wanted(request: Request, work: Awaitable[T], deadline: float) -> T:
    """Awaits work until it is done, the deadline passes or the client hangs up; then the work is cancelled.

    Raises:
        DeadlineError: the deadline passed. ClientGoneError: the client hung up.
    """
    here = asyncio.current_task()
    assert here is not None
    over = gone = False

    def hung_up(watch: asyncio.Task[None]) -> None:
        nonlocal gone
        if not over and not watch.cancelled():
            gone = True
            here.cancel()

    watch = asyncio.create_task(_hang_up(request))
    watch.add_done_callback(hung_up)
    timer = asyncio.timeout(max(0.0, deadline - time.monotonic()))
    try:
        async with timer:
            return await work
    except TimeoutError:
        if timer.expired():
            raise DeadlineError from None
        raise
    except asyncio.CancelledError:
        if not gone:
            raise
        here.uncancel()
        raise ClientGoneError from None
    finally:
        over = True
        watch.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
