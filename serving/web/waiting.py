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
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        left = max(0.0, deadline - time.monotonic())
        await asyncio.wait({job, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        if gone.done():
            raise ClientGoneError
        raise DeadlineError
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
