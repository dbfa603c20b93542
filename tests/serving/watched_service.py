"""`bridle serve` that tells how long each callback kept its event loop.

    python watched_service.py serve ...

On asyncio's own loop, all of whose callbacks are Python objects that can be watched. Standard output gets a line for
each that took the loop's thread over a millisecond of CPU: of CPU, since on a busy machine the clock tells of others.
"""

from __future__ import annotations

import asyncio.events
import sys
import time

TOLD = 0.001


def watch() -> None:
    """From here on."""
    plain = asyncio.events.Handle._run

    def run(handle: asyncio.events.Handle) -> None:
        before = time.thread_time()
        plain(handle)
        took = time.thread_time() - before
        if took > TOLD:
            print(f"{took:.4f} {handle!r}".replace("\n", " "), flush=True)

    asyncio.events.Handle._run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.modules["uvloop"] = None  # type: ignore[assignment]  # uvicorn takes asyncio's loop, then
    watch()
    from bridle.cli import main

    sys.exit(main(sys.argv[1:]))
