"""Messages between this program and a child: whole whatever pieces they come in, bounded, and none lost with a
receiver who gave up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine

import pytest

from bridle.processes.errors import ProtocolError
from bridle.processes.framing import Channel, Line, pack
from bridle.processes.messages import End, FromChild, FromDecoder, Need, Refused


def over_a_pair(test: Callable[[Channel, socket.socket], Coroutine[None, None, None]]) -> Callable[[], None]:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours, FromDecoder | FromChild, 1 << 22)
        with theirs:
            await asyncio.wait_for(test(channel, theirs), 60)
        channel.close()

    def in_loop() -> None:
        asyncio.run(run())

    in_loop.__name__ = test.__name__
    return in_loop


@over_a_pair
async def test_a_message_in_pieces_and_several_in_one_piece(channel: Channel, other: socket.socket) -> None:
    payload = bytes(range(256)) * 10
    whole = pack(Need(), 0) + pack(Refused("k", "m"), len(payload)) + payload + pack(End(), 0)
    for start in range(0, len(whole), 7):
        other.sendall(whole[start : start + 7])
        await asyncio.sleep(0)
    other.sendall(whole)
    for _ in range(2):
        assert [await channel.receive() for _ in range(3)] == [
            (Need(), b""),
            (Refused("k", "m"), payload),
            (End(), b""),
        ]


@over_a_pair
async def test_a_receiver_who_gives_up_takes_no_message_along(channel: Channel, other: socket.socket) -> None:
    waiting = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    other.sendall(pack(Need(), 0)[:5])
    await asyncio.sleep(0.01)
    waiting.cancel()
    other.sendall(pack(Need(), 0)[5:])
    assert await channel.receive() == (Need(), b"")


@over_a_pair
async def test_a_flood_of_messages_waits_at_the_door(channel: Channel, other: socket.socket) -> None:
    message = pack(End(), 100_000) + bytes(100_000)
    other.settimeout(2)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(other.sendall, 200 * message)
    for _ in range(2):
        assert await channel.receive() == (End(), bytes(100_000))


@over_a_pair
async def test_a_payload_larger_than_the_socket_arrives_whole(channel: Channel, other: socket.socket) -> None:
    payload = bytes(3_000_000)
    line = Line(other, FromDecoder | FromChild, 1 << 22)
    _, (message, found) = await asyncio.gather(channel.send(Refused("k", ""), payload), asyncio.to_thread(line.receive))
    assert message == Refused("k", "") and found == payload


@over_a_pair
async def test_nonsense_and_the_end_are_told_after_what_came_before(channel: Channel, other: socket.socket) -> None:
    other.sendall(pack(Need(), 0) + pack(End(), 1 << 40))
    assert await channel.receive() == (Need(), b"")
    with pytest.raises(ProtocolError, match="over the bound"):
        await channel.receive()
    assert channel.ended
    with pytest.raises(ConnectionError):
        await channel.send(End())
