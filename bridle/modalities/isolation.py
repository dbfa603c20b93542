"""Decoding in a child process, where a crash, a hang or a memory bomb takes nothing else down.

The child is a fresh interpreter: it shares no memory, file or secret with its parent. It may use a stated amount of
memory above what it starts with, may write no file, and has no network where the kernel lets it give that up. Answers
come back as JSON and raw arrays, never as pickles, so that a decoder taken over by a file cannot reach the parent.

On the pipe every message is a 4-byte length, that many bytes of JSON, and the bytes of the payload it announces.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bridle.modalities import clip as clip_module
from bridle.modalities.clip import Clip, ClipError, Limits, Modality, TooLargeError, UndecodableError

START_SECONDS = 120.0
"""Time a child has to start; it imports torch, which a cold disk makes slow."""

PIPE_BYTES = 1 << 20
"""Size of a pipe's buffer: what Linux lets any user have. A clip then passes in few switches between the two sides."""

MAX_ANSWER_BYTES = 1 << 31
"""Bytes of one answer at most, whatever a child announces."""

_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_NO_NEW_PRIVS = 0x10000000, 0x40000000, 38
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")

_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 27), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""For glibc: keep the pages of the last file's frames; fetching them anew costs a tenth of a short video."""
_CLIP_ANSWERS = "bridle.modalities.isolation:clip_answers"

Answer = tuple[dict[str, Any], np.ndarray]


class ChildError(RuntimeError):
    """A child that cannot start: nothing about the file, something about this machine."""


class Child:
    """One decoding process. Not for use by two threads at once: see `isolated`.

    Args:
        target: ``module:function`` of ``(data, request) -> Iterator[Answer]``.
        seconds: wall-clock time for each answer.
        memory_bytes: address space the child may take above what it has after its imports.
        imports: modules that the target needs beside its own, imported before the child gives up its rights.
    """

    def __init__(self, target: str, *, seconds: float, memory_bytes: int, imports: tuple[str, ...] = ()) -> None:
        self.seconds, self.memory_bytes, self._owner = seconds, memory_bytes, os.getpid()
        code = "from bridle.modalities.isolation import serve; serve()"
        folders = [str(Path(entry or ".").resolve()) for entry in sys.path]
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= _KEEP_MEMORY
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a user has a budget of pipe memory; the default size works too
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
        self._deadline = time.monotonic() + START_SECONDS
        try:
            hello = {"target": target, "seconds": seconds, "memory_bytes": memory_bytes, "imports": imports}
            self._send(hello, b"")
            self.has_network = bool(self._receive()[0]["network"])
        except (ClipError, OSError) as error:
            self.close()
            raise ChildError(f"the decoding process did not start ({error}); try: bridle doctor") from error

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def answers(self, data: bytes, request: Mapping[str, Any]) -> Iterator[Answer]:
        """What `target` yields for the data and the request (plain JSON data), each within the time limit.

        Raises:
            ClipError: what the target raised; UndecodableError where it crashed, TooLargeError where it took too long.
        """
        self._deadline = time.monotonic() + self.seconds
        self._send({"request": dict(request), "bytes": len(data)}, data)
        while True:
            header, payload = self._receive()
            if "error" in header:
                kind = getattr(clip_module, str(header["error"]), None)
                raise (kind if isinstance(kind, type) and issubclass(kind, ClipError) else UndecodableError)(
                    str(header["message"])[:2000]
                )
            if "answer" not in header:
                return
            yield header["answer"], payload
            self._deadline = time.monotonic() + self.seconds

    def close(self) -> None:
        """Kills the process and frees its pipes; in a fork of the process that started it, only the pipes."""
        self.forget()
        if os.getpid() != self._owner:
            return
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Closes this side's pipes, which ends the child unless another process holds them."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _send(self, header: Mapping[str, Any], data: bytes) -> None:
        descriptor = self._process.stdin.fileno()  # type: ignore[union-attr]
        os.set_blocking(descriptor, False)
        for part in (memoryview(_head(header)), memoryview(data)):
            sent = 0
            while sent < len(part):
                self._wait(descriptor, write=True)
                try:
                    sent += os.write(descriptor, part[sent : sent + (1 << 20)])
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise self._crash() from None

    def _receive(self) -> Answer:
        (length,) = struct.unpack("<I", self._read(4))
        if length > 1 << 20:
            raise UndecodableError("the decoding process answered nonsense; the file is refused")
        try:
            header = json.loads(bytes(self._read(length)))
            shape, dtype = header.get("shape", [0]), np.dtype(header.get("dtype", "uint8"))
            size = prod(shape) * dtype.itemsize
            sound = isinstance(header.get("answer", {}), dict) and dtype.kind in "uif"
            sound = sound and min(shape, default=0) >= 0 and size <= MAX_ANSWER_BYTES
        except (ValueError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise UndecodableError("the decoding process answered nonsense; the file is refused")
        return header, np.frombuffer(self._read(size), dtype).reshape(shape)

    def _read(self, size: int) -> bytearray:
        descriptor = self._process.stdout.fileno()  # type: ignore[union-attr]
        buffer, filled = bytearray(size), 0
        view = memoryview(buffer)
        while filled < size:
            self._wait(descriptor, write=False)
            count = os.readv(descriptor, [view[filled:]])
            if not count:
                raise self._crash()
            filled += count
        return buffer

    def _wait(self, descriptor: int, *, write: bool) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT if write else select.POLLIN)
        if not poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            raise TooLargeError(
                f"decoding took longer than the limit of {self.seconds:g} s for one clip; send a smaller file"
            )

    def _crash(self) -> ClipError:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return UndecodableError("the decoding process hung up without an answer; the file is refused")
        if code == -signal.SIGALRM:
            return TooLargeError(f"decoding took longer than the limit of {self.seconds:g} s for one clip")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return UndecodableError(f"the decoder crashed ({name}); the file is corrupt")


_idle: dict[tuple[str, float, int, tuple[str, ...]], list[Child]] = {}
_lock = threading.Lock()


def isolated(
    target: str,
    data: bytes,
    request: Mapping[str, Any],
    *,
    seconds: float,
    memory_bytes: int,
    imports: tuple[str, ...] = (),
) -> Iterator[Answer]:
    """`Child.answers` by an idle child of this process, or by a new one.

    Every thread has a child to itself while it asks. A child that failed in any way but by a clean `ClipError` of its
    target, and one whose answers were not read to the end, is killed.
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
    except ClipError:
        reusable = child._process.poll() is None and time.monotonic() < child._deadline
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


def isolated_windows(modality: Modality, data: bytes, *, seconds: float, memory_bytes: int) -> Iterator[Clip]:
    """`modality.windows(data)`, decoded and prepared in a child: for services and bulk work on strangers' files.

    Raises:
        ClipError: as `windows`, and where the child crashed, hung or wanted too much memory.
    """
    import torch  # not above: a child that only decodes does without, and starts in a fifth of the time

    request = {
        "modality": modality.name,
        "settings": modality.settings.model_dump(mode="json"),
        "limits": modality.limits.model_dump(mode="json"),
    }
    bounds: dict[str, Any] = {"seconds": seconds, "memory_bytes": memory_bytes}
    needed = (type(modality).__module__,)
    for header, values in isolated(_CLIP_ANSWERS, data, request, imports=needed, **bounds):
        yield Clip(values=torch.from_numpy(values), **header)


def clip_answers(data: bytes, request: Mapping[str, Any]) -> Iterator[Answer]:
    """In the child: the windows of the modality that the request describes."""
    from bridle.modalities import build_modality

    settings = request["settings"] | ({"isolate": False} if "isolate" in request["settings"] else {})
    modality = build_modality(request["modality"], settings, Limits.model_validate(request["limits"]))
    for clip in modality.windows(data):
        header = {"grid": clip.grid, "valid": clip.valid, "start_s": clip.start_s, "duration_s": clip.duration_s}
        yield header, clip.values.numpy()


def serve() -> None:
    """The child's main: answers requests from stdin on stdout until stdin ends."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # a library that prints must not print into an answer
    network = not leave_network()
    hello = _read_header(source)
    module, _, name = hello["target"].partition(":")
    target = getattr(importlib.import_module(module), name)
    for needed in hello["imports"]:
        importlib.import_module(needed)
    confine(hello["memory_bytes"])
    _write(sink, {"network": network})
    while True:
        try:
            header = _read_header(source)
        except EOFError:
            return
        _answer(target, source.read(header["bytes"]), header["request"], sink, hello["seconds"])


def _answer(target: Callable[..., Iterator[Answer]], data: bytes, request: Any, sink: BinaryIO, seconds: float) -> None:
    """Runs the target; the kernel ends the process if one answer takes twice its time, parent or no parent."""
    try:
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        for answer, array in target(data, request):
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(sink, {"answer": answer, "shape": array.shape, "dtype": array.dtype.str}, array)
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(sink, {"end": True})
    except Exception as error:  # the parent decides; a fault of ours is told, not lost with the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(error, MemoryError):
            error = TooLargeError("decoding needs more memory than the limit on its process")
        elif not isinstance(error, ClipError):
            error = UndecodableError(f"the decoder failed ({type(error).__name__}: {error})")
        _write(sink, {"error": type(error).__name__, "message": str(error)})


def confine(memory_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    for what, bound in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        lowest = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (lowest, lowest))
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def leave_network() -> bool:
    """Moves into a network namespace without any interface; whether the kernel allowed it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWUSER | _CLONE_NEWNET, _CLONE_NEWNET))


def _head(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text


def _write(sink: BinaryIO, header: Mapping[str, Any], array: np.ndarray | None = None) -> None:
    views = [memoryview(_head(header))]
    if array is not None:
        views.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    for view in views:
        sent = 0
        while sent < len(view):
            sent += sink.write(view[sent:])


def _read_header(source: BinaryIO) -> dict[str, Any]:
    length = source.read(4)
    if len(length) < 4:
        raise EOFError
    found: dict[str, Any] = json.loads(source.read(struct.unpack("<I", length)[0]))
    return found
