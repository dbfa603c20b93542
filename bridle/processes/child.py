"""Child processes for programs that wait: work on strangers' bytes where a crash, a hang or greed takes nothing down.

The child is a fresh interpreter: it shares no memory, file or secret with its parent. It may use a stated amount of
memory above what it starts with, may write no file, and has no network where the kernel lets it give that up.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridle.processes.confinement import child_environment, confine, leave_network, time_limit
from bridle.processes.errors import (
    ChildError,
    ChildFaultError,
    ForeignRefusalError,
    ProcessGoneError,
    ProtocolError,
    RefusedError,
    SlowError,
)
from bridle.processes.framing import Line
from bridle.processes.messages import (
    VERSION,
    Answer,
    Ask,
    Begin,
    Cancel,
    End,
    Fault,
    FromChild,
    Ready,
    Refused,
    ToChild,
    array_of,
    fault_of,
)

START_SECONDS = 120.0
"""Time a child has to start; it may import torch, which a cold disk makes slow."""
MAX_ANSWER_BYTES = 1 << 31
"""Bytes of one answer at most, whatever a child announces."""
CANCEL_SECONDS = 1.0
"""Time that a child whose answers nobody wants any more has to stop; a new one takes about as long to start."""
SOCKET_BYTES = 1 << 20
"""Asked for a socket's buffer, so that an answer passes in few switches between the two sides."""

Found = tuple[dict[str, Any], np.ndarray]
Target = Callable[[bytes, Mapping[str, Any]], Iterator[Found]]


class Child:
    """One child. Not for use by two threads at once: see `answers_of`.

    Args:
        target: ``module:function`` of ``(data, request) -> Iterator[(header, array)]``; header and request plain data.
        seconds: wall-clock time for each answer.
        memory_bytes: address space the child may take above what it has after its imports.
        imports: modules that the target needs beside its own, imported before the child gives up its rights.

    Raises:
        ChildError: it does not start.
    """

    def __init__(self, target: str, *, seconds: float, memory_bytes: int, imports: tuple[str, ...] = ()) -> None:
        self.seconds, self._owner = seconds, os.getpid()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        folders = [str(Path(entry or ".").resolve()) for entry in sys.path]
        environment = child_environment() | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-B",
                    "-c",
                    f"from bridle.processes.child import serve; serve({theirs.fileno()})",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        self._line = Line(ours, FromChild, MAX_ANSWER_BYTES)
        self._line.until = time.monotonic() + START_SECONDS
        try:
            self._line.send(Begin(VERSION, target, list(imports), seconds, memory_bytes))
            hello, _ = self._line.receive()
            if not isinstance(hello, Ready) or hello.version != VERSION:
                raise ChildError(hello.message if isinstance(hello, Fault) else "it is of another version")
        except (OSError, EOFError, ChildError) as error:
            self.close()
            told = str(error) or type(error).__name__
            raise ChildError(f"a child process did not start ({told}); try: bridle doctor") from error
        self.has_network = not hello.offline

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """Whether it lives and was not left in the middle of something that took too long."""
        return self._process.poll() is None and time.monotonic() < (self._line.until or 0)

    def answers(self, data: bytes, request: Mapping[str, Any]) -> Iterator[Found]:
        """What the target yields for the data and the request, each within the time limit.

        Raises:
            ForeignRefusalError: what the target refused. SlowError: it took too long.
            ChildFaultError: the target failed. ProcessGoneError: the child ended. ProtocolError: it talks nonsense.
        """
        self._line.until = time.monotonic() + self.seconds
        try:
            self._line.send(Ask(dict(request)), data)
            while True:
                message, payload = self._line.receive()
                if isinstance(message, End):
                    return
                yield self._found(message, payload)
                self._line.until = time.monotonic() + self.seconds
        except (EOFError, ConnectionError) as error:
            if isinstance(error, ProtocolError):
                raise
            raise self._ended() from None

    @staticmethod
    def _found(message: Any, payload: bytearray) -> Found:
        if isinstance(message, Refused):
            raise ForeignRefusalError(message.kind, message.message)
        if isinstance(message, Fault):
            raise ChildFaultError(message.message, message.traceback, memory=message.memory)
        if not isinstance(message, Answer):
            raise ProtocolError("a message out of turn")
        try:
            return message.header, array_of(message, payload)
        except (ValueError, TypeError) as error:
            raise ProtocolError(str(error)) from None

    def cancel(self) -> bool:
        """Gives up the answers still to come, but for the one that the child is at. Whether it can be asked again."""
        self._line.until = time.monotonic() + CANCEL_SECONDS
        try:
            self._line.send(Cancel())
            while not isinstance(self._line.receive()[0], End | Refused | Fault):
                pass
        except (EOFError, OSError, SlowError):
            return False
        return True

    def _ended(self) -> Exception:
        """Why the line broke: the kernel's alarm is slowness, no answer to our look is a hang."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return ProcessGoneError(None)
        return SlowError() if code == -signal.SIGALRM else ProcessGoneError(code)

    def close(self) -> None:
        """Kills the process and frees its socket; in a fork of the process that started it, only the socket."""
        self.forget()
        if os.getpid() != self._owner:
            return
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Closes this side's socket, which ends the child unless another process holds it."""
        with contextlib.suppress(OSError):
            self._line.sock.close()


_idle: dict[tuple[str, float, int, tuple[str, ...]], list[Child]] = {}
_lock = threading.Lock()


def answers_of(
    target: str,
    data: bytes,
    request: Mapping[str, Any],
    *,
    seconds: float,
    memory_bytes: int,
    imports: tuple[str, ...] = (),
) -> Iterator[Found]:
    """`Child.answers` by an idle child of this process, or by a new one.

    Every thread has a child to itself while it asks. A child that failed in any way but by a clean refusal or fault of
    its target is killed, and so is one that does not stop soon when its answers are not read to the end.
    """
    key = (target, seconds, memory_bytes, imports)
    with _lock:
        idle = _idle.setdefault(key, [])
        child = idle.pop() if idle else None
    if child is not None and child._process.poll() is not None:
        child.close()
        child = None
    child = child or Child(target, seconds=seconds, memory_bytes=memory_bytes, imports=imports)
    reusable = False
    try:
        yield from child.answers(data, request)
        reusable = True
    except (RefusedError, ChildFaultError):
        reusable = child.usable
        raise
    except GeneratorExit:
        reusable = child.cancel()
        raise
    finally:
        if reusable:
            with _lock:
                idle.append(child)
        else:
            child.close()


def close_idle() -> None:
    """Ends this process's idle children."""
    with _lock:
        children = [child for group in _idle.values() for child in group]
        _idle.clear()
    for child in children:
        child.close()


def _forget_inherited() -> None:
    """After a fork: the parent's children answer the parent, not us."""
    global _lock
    _lock = threading.Lock()
    for child in [child for group in _idle.values() for child in group]:
        child.forget()
    _idle.clear()


atexit.register(close_idle)
os.register_at_fork(after_in_child=_forget_inherited)


def serve(descriptor: int) -> None:
    """The child's main: answers requests on the socket until it closes."""
    line = Line(socket.socket(fileno=descriptor), ToChild, 1 << 40)
    begin, _ = line.receive()
    if not isinstance(begin, Begin) or begin.version != VERSION:
        line.send(Ready(VERSION, offline=False))
        return
    try:
        module, _, name = begin.target.partition(":")
        offline = leave_network()
        target: Target = getattr(importlib.import_module(module), name)
        for needed in begin.imports:
            importlib.import_module(needed)
        confine(begin.memory_bytes)
    except Exception as error:
        line.send(fault_of(error, traceback.format_exc()))
        return
    line.send(Ready(VERSION, offline))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            ask, data = line.receive()
            if isinstance(ask, Ask):  # else a cancellation that came after the job's end
                _answer(line, target, bytes(data), ask.request, begin.seconds)


def _answer(line: Line, target: Target, data: bytes, request: Mapping[str, Any], seconds: float) -> None:
    """Runs the target; the kernel ends the process if one answer takes twice its time, parent or no parent."""
    last: Any = End()
    payload = b""
    try:
        time_limit(2 * seconds)
        for header, found in target(data, request):
            time_limit(0)
            if line.waiting():
                line.receive()  # nothing but a cancellation comes before the end
                break
            array = np.ascontiguousarray(found)
            line.send(Answer(header, list(array.shape), array.dtype.str), array.reshape(-1).view(np.uint8).data)
            time_limit(2 * seconds)
    except RefusedError as error:
        last = Refused(type(error).__name__, str(error)[:2000])
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # the parent decides; a fault of ours is told, not lost with the process
        last = fault_of(error, traceback.format_exc())
    time_limit(0)
    line.send(last, payload)
