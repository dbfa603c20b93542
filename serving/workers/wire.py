"""Messages between the service and its processes: JSON and raw bytes on a socket, never pickles.

A message is two lengths (4 and 8 bytes, little endian), that much JSON and that many bytes of payload. What a decoding
process says is not trusted: lengths are bounded before anything is read.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

_LENGTHS = struct.Struct("<IQ")
MAX_HEADER = 1 << 20


class WireError(ConnectionError):
    """A message that the protocol does not allow."""


Buffer = bytes | bytearray | memoryview


def pack(header: dict[str, Any], payload: int) -> bytes:
    """The first part of a message whose payload has so many bytes."""
    text = json.dumps(header).encode()
    return _LENGTHS.pack(len(text), payload) + text


def send(sock: socket.socket, header: dict[str, Any], payload: Buffer = b"") -> None:
    """Sends a message from a blocking process."""
    view = memoryview(payload).cast("B")
    head = pack(header, len(view))
    if len(view) < 1 << 16:
        sock.sendall(head + bytes(view))
        return
    sock.sendall(head)
    sock.sendall(view)


def receive(sock: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """Receives a message in a blocking process.

    Raises:
        EOFError: the other side is gone.
    """
    header, payload = _LENGTHS.unpack(_exactly(sock, _LENGTHS.size))
    found: dict[str, Any] = json.loads(bytes(_exactly(sock, header)))
    return found, _exactly(sock, payload)


def _exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        count = sock.recv_into(view[filled:])
        if not count:
            raise EOFError("the service is gone")
        filled += count
    return buffer


class Channel:
    """The service's side of a socket to one of its processes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_payload: int) -> None:
        self._reader = reader
        self._writer = writer
        self._max_payload = max_payload

    @classmethod
    async def over(cls, sock: socket.socket, max_payload: int) -> Channel:
        """A channel over one end of a socket pair."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 20)
        return cls(reader, writer, max_payload)

    async def send(self, header: dict[str, Any], payload: Buffer = b"") -> None:
        """Sends a message.

        Raises:
            ConnectionError: the process is gone.
        """
        self._writer.write(pack(header, len(payload)))
        if payload:
            self._writer.write(payload)
        await self._writer.drain()

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """Receives a message.

        Raises:
            EOFError, ConnectionError: the process is gone, or says what the protocol does not allow.
        """
        header_size, payload_size = _LENGTHS.unpack(await self._reader.readexactly(_LENGTHS.size))
        if header_size > MAX_HEADER or payload_size > self._max_payload:
            raise WireError(f"a message of {header_size} and {payload_size} bytes is over the bound")
        try:
            header = json.loads(await self._reader.readexactly(header_size))
        except ValueError:
            raise WireError("a message that is not JSON") from None
        if not isinstance(header, dict):
            raise WireError("a message that is no object")
        return header, await self._reader.readexactly(payload_size) if payload_size else b""

    def close(self) -> None:
        """Closes the socket, which ends the process behind it."""
        self._writer.close()
