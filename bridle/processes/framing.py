"""How messages stand on a socket: two lengths (4 and 8 bytes, little endian), the struct as MessagePack, the payload.

Never pickles. Lengths are bounded before anything is read.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import time
from functools import cache
from typing import Any

import msgspec

from bridle.processes.errors import ProtocolError, SlowError
from bridle.processes.messages import Message

Buffer = bytes | bytearray | memoryview
MAX_HEADER = 1 << 20
_LENGTHS = struct.Struct("<IQ")
_AT_ONCE = 1 << 20
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
        if len(view) < 1 << 16:
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


class Channel:
    """The same for asyncio. Made by `over`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: Any, max_payload: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._allowed = allowed
        self._max_payload = max_payload

    @classmethod
    async def over(cls, sock: socket.socket, allowed: Any, max_payload: int) -> Channel:
        """A channel over one end of a socket pair."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 20)
        return cls(reader, writer, allowed, max_payload)

    async def send(self, message: Message, payload: Buffer = b"") -> None:
        """Sends a message.

        Raises:
            ConnectionError: the process is gone.
        """
        view = memoryview(payload).cast("B")
        self._writer.write(pack(message, len(view)))
        for start in range(0, len(view), _AT_ONCE):  # what the socket does not take at once is copied
            self._writer.write(view[start : start + _AT_ONCE])
            await self._writer.drain()
        if not len(view):
            await self._writer.drain()

    async def receive(self) -> tuple[Any, bytes]:
        """Receives a message of the allowed kinds, and its payload.

        Raises:
            EOFError, ConnectionError: the process is gone, or says what the protocol does not allow.
        """
        header, payload = _lengths(await self._reader.readexactly(_LENGTHS.size), self._max_payload)
        message = _read(await self._reader.readexactly(header), self._allowed)
        return message, await self._reader.readexactly(payload) if payload else b""

    def close(self) -> None:
        """Closes the socket, which ends the process behind it."""
        self._writer.close()
