"""How messages stand on a socket: two lengths (4 and 8 bytes, little endian), the struct as MessagePack, the payload.

Never pickles. Lengths are bounded before anything is read.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import time
from collections import deque
from functools import cache
from typing import Any, cast

import msgspec

from bridle.processes.errors import ProtocolError, SlowError
from bridle.processes.messages import Message

Buffer = bytes | bytearray | memoryview
MAX_HEADER = 1 << 20
_LENGTHS = struct.Struct("<IQ")
_AT_ONCE = 1 << 20
_TOGETHER = 1 << 16
"""Bytes of a payload that is copied behind its header: one call of the kernel, one waking of the other side."""
_AHEAD = 64
"""Messages that wait to be received before no more are read."""
_encode = msgspec.msgpack.Encoder().encode


@cache
def _decoder(allowed: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(allowed)


def pack(message: Message, payload: int) -> bytes:
    """The first part of a message whose payload has so many bytes."""
    header = _encode(message)
    return _LENGTHS.pack(len(header), payload) + header


def _lengths(head: Buffer, max_payload: int) -> tuple[int, int]:
    header, payload = _LENGTHS.unpack(head)
    if header > MAX_HEADER or payload > max_payload:
        raise ProtocolError(f"a message of {header} and {payload} bytes is over the bound")
    return header, payload


def _read(header: Buffer, allowed: Any) -> Any:
    try:
        return _decoder(allowed).decode(header)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a message that is none of those expected: {error}") from None


class Line:
    """A socket to another process, for programs that wait. `until` bounds how long: a monotonic time, or none.

    Args:
        allowed: union of the messages that may come; max_payload: bytes of a payload that may come.
    """

    def __init__(self, sock: socket.socket, allowed: Any, max_payload: int) -> None:
        self.sock = sock
        self.until: float | None = None
        self._allowed = allowed
        self._max_payload = max_payload

    def send(self, message: Message, payload: Buffer = b"") -> None:
        """Sends a message.

        Raises:
            SlowError: not within the time. ConnectionError: the other side is gone.
        """
        view = memoryview(payload).cast("B")
        head = pack(message, len(view))
        if len(view) < _TOGETHER:
            head, view = head + bytes(view), memoryview(b"")
        for part in (memoryview(head), view):
            sent = 0
            while sent < len(part):
                self._patience()
                try:
                    sent += self.sock.send(part[sent : sent + _AT_ONCE])
                except TimeoutError:
                    raise SlowError from None

    def waiting(self) -> bool:
        """Whether `receive` has something to read, or the other side is gone."""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(0))

    def receive(self) -> tuple[Any, bytearray]:
        """Receives a message of the allowed kinds, and its payload.

        Raises:
            SlowError: not within the time. EOFError, ConnectionError: the other side is gone, or not to be trusted.
        """
        header, payload = _lengths(self._exactly(_LENGTHS.size), self._max_payload)
        message = _read(self._exactly(header), self._allowed)
        return message, self._exactly(payload)

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view, filled = memoryview(buffer), 0
        while filled < size:
            self._patience()
            try:
                count = self.sock.recv_into(view[filled:])
            except TimeoutError:
                raise SlowError from None
            if not count:
                raise EOFError("the other process is gone")
            filled += count
        return buffer

    def _patience(self) -> None:
        if self.until is None:
            return
        left = self.until - time.monotonic()
        if left <= 0:
            raise SlowError
        self.sock.settimeout(left)


class Channel(asyncio.Protocol):
    """The same for asyncio. Made by `over`. Messages are unpacked as bytes come, so that a receiver who is cancelled
    leaves none half read."""

    def __init__(self, allowed: Any, max_payload: int) -> None:
        self._allowed = allowed
        self._max_payload = max_payload
        self._transport: asyncio.Transport
        self._bytes = bytearray()
        self._messages: deque[tuple[Any, bytes]] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._held = False
        self._end: Exception | None = None

    @classmethod
    async def over(cls, sock: socket.socket, allowed: Any, max_payload: int) -> Channel:
        """A channel over one end of a socket pair."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(allowed, max_payload), sock=sock)
        return channel

    @property
    def ended(self) -> bool:
        """Whether the other side is gone."""
        return self._end is not None

    async def send(self, message: Message, payload: Buffer = b"") -> None:
        """Sends a message.

        Raises:
            ConnectionError: the process is gone.
        """
        view = memoryview(payload).cast("B")
        head = pack(message, len(view))
        if len(view) < _TOGETHER:
            head, view = head + view, view[:0]
        await self._write(head)
        for start in range(0, len(view), _AT_ONCE):  # what the socket does not take at once is copied
            await self._write(view[start : start + _AT_ONCE])

    async def _write(self, data: Buffer) -> None:
        if self._end is not None:
            raise ConnectionResetError("the other process is gone")
        self._transport.write(data)
        while self._room is not None:
            await asyncio.shield(self._room)
            if self._end is not None:
                raise ConnectionResetError("the other process is gone")

    async def receive(self) -> tuple[Any, bytes]:
        """Receives a message of the allowed kinds, and its payload. For one receiver at a time.

        Raises:
            EOFError, ConnectionError: the process is gone, or says what the protocol does not allow.
        """
        while not self._messages:
            if self._end is not None:
                raise self._end
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        if self._held and len(self._messages) < _AHEAD:
            self._held = False
            self._transport.resume_reading()
        return self._messages.popleft()

    def close(self) -> None:
        """Closes the socket, which ends the process behind it."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The event loop's: the socket is ready."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent

    def data_received(self, data: bytes) -> None:
        """The event loop's: bytes are here."""
        self._bytes += data
        try:
            self._unpack()
        except ProtocolError as error:
            self._end = error
            self._bytes = bytearray()
            self._transport.abort()
        if len(self._messages) >= _AHEAD and not self._held:
            self._held = True
            self._transport.pause_reading()
        _wake(self._arrival)

    def _unpack(self) -> None:
        at, found = 0, self._bytes
        while len(found) - at >= _LENGTHS.size:
            header, payload = _lengths(found[at : at + _LENGTHS.size], self._max_payload)
            start = at + _LENGTHS.size
            end = start + header + payload
            if len(found) < end:
                break
            with memoryview(found) as view:
                message = _read(view[start : start + header], self._allowed)
                self._messages.append((message, bytes(view[start + header : end])))
            at = end
        del found[:at]

    def pause_writing(self) -> None:
        """The event loop's: the other side takes no more."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The event loop's: it does again."""
        room, self._room = self._room, None
        _wake(room)

    def connection_lost(self, exc: Exception | None) -> None:
        """The event loop's: the other side is gone."""
        self._end = self._end or EOFError("the other process is gone")
        self.resume_writing()
        _wake(self._arrival)


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
