"""The other HTTP processes of one service, each asked over a socket of its own in a folder that only we may enter.

What concerns all of them, /metrics and reloading, whichever process got it asks of all. A question carries the caller's
own key, and is answered as any request is, except that it is not passed on (see `from_sibling`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
from starlette.requests import Request

from serving.web.counts import Counts
from serving.web.problems import ProblemError
from serving.web.totals import add_up

PASSED_ON = ("authorization", "x-api-key", "x-request-id")
METRICS_SECONDS = 5.0
RELOAD_SECONDS = 600.0


class Siblings:
    """All HTTP processes of a service, seen by one of them.

    own: its number, of `count`; folder: of the sockets; devices: of all processes together.
    """

    def __init__(self, own: int, count: int, folder: Path, counts: Counts, devices: list[str]) -> None:
        self.counts = counts
        self.devices = devices
        self.replaces = counts.was_started(own)
        """Whether another process has had this place, which others share with it by now."""
        self._folder = folder
        self._own = own
        self._others = [number for number in range(count) if number != own]

    @property
    def door(self) -> Path:
        """The socket on which this process is asked by the others."""
        return self._door(self._own)

    def _door(self, number: int) -> Path:
        return self._folder / f"{number}.sock"

    async def metrics(self, request: Request, text: bytes) -> bytes:
        """The metrics of all processes as one; text: this one's."""
        answers = await asyncio.gather(*(self._ask(number, request, METRICS_SECONDS) for number in self._others))
        found = {self._own: text.decode()}
        found |= {
            number: answer.text
            for number, answer in zip(self._others, answers, strict=True)
            if answer is not None and answer.status_code == 200
        }
        return await asyncio.to_thread(add_up, found, self._folder / "totals.json")

    async def reload(self, request: Request) -> None:
        """Has the others reload what this one has reloaded.

        Raises:
            ProblemError: one could not (409), or is starting (503); those before it have the new model.
        """
        for number in self._others:
            answer = await self._ask(number, request, RELOAD_SECONDS)
            if answer is None:
                told = f"HTTP process {number} is starting; reload again, so that all have one model"
                raise ProblemError("unavailable", told, retry_after=10)
            if answer.status_code != 200:
                problem = answer.json()
                kind = str(problem.get("type", "")).rpartition(":")[2] or "internal"
                raise ProblemError(kind, f"HTTP process {number}: {problem.get('detail')}; others have the new model")

    async def _ask(self, number: int, request: Request, seconds: float) -> httpx.Response | None:
        """The request, sent on to another process; nothing where that one cannot be reached."""
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        transport = httpx.AsyncHTTPTransport(uds=str(self._door(number)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=seconds) as client:
            try:
                return await client.request(
                    request.method, request.url.path, params=dict(request.query_params), headers=headers
                )
            except httpx.TransportError:
                return None


def from_sibling(request: Request) -> bool:
    """Whether another HTTP process asks: its connection has no address."""
    return request.client is None
