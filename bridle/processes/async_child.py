"""Child processes for asyncio: forked from the template, spoken to over a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from bridle.processes.confinement import settle_in
from bridle.processes.errors import ChildError, ProcessGoneError
from bridle.processes.framing import Channel, Line
from bridle.processes.memory import Shared, hand_over, take_over
from bridle.processes.messages import VERSION, Fault, Message, ModelReady, Ready
from bridle.processes.template import CONTEXT

START_SECONDS = 300.0
"""Time for a process to start and warm up."""
MAX_TO_CHILD = 1 << 40
"""Bytes of a payload to a child: we bound what we send; this is only a sane number."""

Main = Callable[[Line, Shared], None]


def _enter(target: str, title: str, understood: Any, sock: socket.socket) -> None:
    settle_in(title)
    memory = take_over(sock)
    module, _, name = target.partition(":")
    main: Main = getattr(importlib.import_module(module), name)
    main(Line(sock, understood, MAX_TO_CHILD), memory)


class AsyncChild:
    """One process and the channel to it. Made by `start`.

    hello: what it said when it was ready.
    """

    def __init__(self, process: Any, channel: Channel) -> None:
        self._process = process
        self.channel = channel
        self.hello: Any = None

    @classmethod
    async def start(
        cls,
        target: str,
        title: str,
        begin: Message,
        *,
        memory: int,
        understood: Any,
        allowed: Any,
        max_payload: int,
    ) -> AsyncChild:
        """Starts a process, sends its first message, waits until it is ready.

        target: ``module:function`` of ``(line, memory)``, named, for only the process needs its imports; title: what
        it is seen as; memory: descriptor of what it shares with us; understood: union of the messages that it takes;
        allowed: of those it may send; max_payload: bytes of a payload of its.

        Raises:
            ProcessGoneError: it ended before it was ready. ChildError: it said why it cannot start.
        """
        ours, theirs = socket.socketpair()
        process = CONTEXT.Process(target=_enter, args=(target, title, understood, theirs), name=title, daemon=True)
        try:
            await asyncio.to_thread(process.start)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        hand_over(ours, memory)
        child = cls(process, await Channel.over(ours, allowed, max_payload))
        try:
            async with asyncio.timeout(START_SECONDS):
                await child.channel.send(begin)
                child.hello, _ = await child.channel.receive()
        except (EOFError, ConnectionError):
            raise ProcessGoneError(await child.end()) from None
        except BaseException:
            await child.end()
            raise
        if not isinstance(child.hello, Ready | ModelReady) or child.hello.version != VERSION:
            await child.end()
            told = child.hello.message if isinstance(child.hello, Fault) else "it speaks another version; start anew"
            raise ChildError(told)
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    async def end(self, patience: float = 2.0) -> int | None:
        """Closes the channel, which ends the process, and kills it if it stays. Returns its exit code."""
        self.channel.close()
        end = time.monotonic() + patience
        while self._process.is_alive():
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            await asyncio.sleep(0.005)
        code = self._process.exitcode
        self._process.close()
        return int(code) if code is not None else None
