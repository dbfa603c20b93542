"""How much longer an honest client waits while another attacks the service, each in its own way.

    python benchmarks/serving_attacks.py MODEL_DIR FILE ... [--seconds 15]
    python benchmarks/serving_attacks.py --small [--seconds 15]

One service; one honest client that asks for a file's codes again and again, ten times a second at most. Before, between
and after the attacks it is undisturbed. Attacks come from a process of their own and from another address; what they
are was found against earlier versions, see docs/serving.md, Fairness. Prints the honest client's p99 for each attack
over its undisturbed p99 of the same run (to be at most 3), how many of its requests were refused, and how many the
attacker had answered. On a machine that has few cores, the attacker's and the client's own work count too.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from http_load import Running, free_port
from PIL import Image

from serving import small_case

HONEST, OTHER = "127.0.0.2", "127.0.0.3"
PAUSE = 0.1
NPZ = "application/x-npz"
BAR = 3.0
Attack = Callable[[int], Coroutine[Any, Any, None]]
"""Runs against a port until it is ended."""


def request(path: str, body: bytes, **headers: str) -> bytes:
    """A whole POST request."""
    rows = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    rows += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*rows, "", ""]).encode() + body


async def answer_to(port: int, data: bytes, address: str) -> int:
    """The status of the answer to one request on a connection of its own; 0 where there was none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0), limit=1 << 24)
    except OSError:
        return 0
    try:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        rows = dict(row.partition(b": ")[::2] for row in head.lower().split(b"\r\n"))
        await reader.readexactly(int(rows.get(b"content-length", b"0")))
        size = int(b"transfer-encoding" in rows)
        while size:
            size = int(await reader.readuntil(b"\r\n"), 16)
            await reader.readexactly(size + 2)
        return int(head.split()[1])
    except (OSError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


async def honest(port: int, data: bytes, seconds: float) -> tuple[list[float], Counter[int]]:
    """Times of the answers and their statuses."""
    times, statuses, end = [], Counter[int](), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        statuses[await answer_to(port, data, HONEST)] += 1
        times.append(time.perf_counter() - began)
        await asyncio.sleep(max(0.0, PAUSE - times[-1]))
    return times, statuses


# The attacks.


def over_and_over(data: bytes, clients: int) -> Attack:
    """Clients that each ask again once answered, until they are ended; prints the statuses now and then."""

    async def attack(port: int) -> None:
        async def one() -> None:
            while True:
                print(await answer_to(port, data, OTHER), flush=True)

        await asyncio.gather(*(one() for _ in range(clients)))

    return attack


def unread(data: bytes, count: int) -> Attack:
    """Connections that ask and do not read."""

    async def attack(port: int) -> None:
        while True:
            socks = []
            for _ in range(count):
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.bind((OTHER, 0))
                sock.connect(("127.0.0.1", port))
                sock.sendall(data)
                socks.append(sock)
            await asyncio.sleep(8)
            for sock in socks:
                print(sock.recv(12)[9:].decode() or 0, flush=True)
                sock.close()

    return attack


def dribbling(count: int) -> Attack:
    """Connections that send a byte each second of a body that never ends."""

    async def attack(port: int) -> None:
        async def one() -> None:
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(OTHER, 0))
                writer.write(request("/tokenize", b"", Content_Length="100000").replace(b"Content-Length: 0\r\n", b""))
                while not writer.is_closing():
                    writer.write(b"x")
                    await asyncio.sleep(1)

        await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)

    return attack


def idle(count: int) -> Attack:
    """Connections that say nothing, opened anew a second after they are closed."""

    async def attack(port: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

        async def one() -> None:
            while True:
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(OTHER, 0))
                await reader.read()
                writer.close()
                await asyncio.sleep(1)

        await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)

    return attack


def npz(numbers: int) -> bytes:
    """Codes that take few bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out, out.open("codes.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros((1, numbers), np.int64))
    return file.getvalue()


def many_scans(count: int) -> bytes:
    """A large progressive JPEG of one colour, one scan of whose is there `count` times more."""
    file = io.BytesIO()
    Image.new("L", (7000, 7000), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    tables = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xc4"]
    end = min(at for at in (*tables, *starts[2:]) if at > starts[1])
    return data[:end] + data[starts[1] : end] * count + data[end:]


def many_chunks(count: int) -> bytes:
    """A PNG with so many empty chunks before its content."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "PNG")
    data = file.getvalue()
    empty = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    return data[:33] + empty * count + data[33:]


def large_picture() -> bytes:
    """49 million pixels in few bytes."""
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(file, "PNG")
    return file.getvalue()


def form(content: bytes, count: int) -> bytes:
    """The same file many times."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + content + b"\r\n"
    return part * count + b"--b--\r\n"


def attacks(content: bytes) -> dict[str, Callable[[], Attack]]:
    """What makes each of them, by name. content: an honest file."""
    as_json, as_npz = {"Content_Type": "application/json"}, {"Content_Type": NPZ, "Accept": NPZ}
    as_form, hurried = {"Content_Type": "multipart/form-data; boundary=b"}, {"X_Request_Timeout": "0.1"}
    tiny = b'{"clips":[' + b",".join([b'{"codes":[[1]]}'] * 100_000) + b"]}"
    codes = b'{"clips":[{"codes":[[' + b",".join([b"1"] * 30_000) + b"]]}]}"
    return {
        "100,000 tiny clips": lambda: over_and_over(request("/dequantize", tiny, **as_json), 4),
        "large answers as JSON": lambda: over_and_over(request("/dequantize", codes, **as_json), 4),
        "answers of 50 MB, unread": lambda: unread(request("/dequantize", npz(400_000), **as_npz), 64),
        "64 bodies that dribble": lambda: dribbling(64),
        "JPEGs of 400 scans": lambda: over_and_over(request("/tokenize", many_scans(400), **hurried), 4),
        "a million PNG chunks": lambda: over_and_over(request("/tokenize", many_chunks(1_000_000)), 4),
        "as many bytes, of nothing": lambda: over_and_over(request("/tokenize", bytes(len(many_chunks(1_000_000)))), 4),
        "pictures of 7000 x 7000": lambda: over_and_over(request("/tokenize", large_picture()), 4),
        "4,200 idle connections": lambda: idle(4200),
        "64 files a request, 16 clients": lambda: over_and_over(request("/tokenize", form(content, 64), **as_form), 16),
    }


# The run.


def main() -> int:
    args = _arguments()
    if args.attack:
        attack = attacks(Path(args.files[0]).read_bytes())[args.attack]()
        print("begins", flush=True)
        asyncio.run(attack(args.port))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        if args.small:
            args.model, args.files = small_case(Path(scratch))
        return _compare(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--small", action="store_true", help="a model and pictures of its own, both small")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each attack")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small == bool(args.files):
        parser.error("give a model folder and files, or --small")
    return args


def _compare(args: argparse.Namespace) -> int:
    port = free_port()
    command = [sys.executable, "-m", "bridle.cli", "serve", args.model, f"--port={port}", "--lame-duck-seconds=0"]
    content = Path(args.files[0]).read_bytes()
    data = request("/tokenize", content)
    found: dict[str, tuple[list[float], Counter[int], Counter[str]]] = {}
    quiet: list[float] = []
    with Running([*command, "--log-level=error"], port, "/readyz"):
        asyncio.run(honest(port, data, 3.0))
        for name in (name for name in attacks(content) if args.only in name):
            quiet += asyncio.run(honest(port, data, args.seconds / 2))[0]
            words = [sys.executable, __file__, args.model, args.files[0], f"--attack={name}", f"--port={port}"]
            with subprocess.Popen(
                words, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
            ) as attacker:
                assert attacker.stdout is not None
                attacker.stdout.readline()  # it has made what it sends
                time.sleep(1.0)
                times, statuses = asyncio.run(honest(port, data, args.seconds))
                attacker.kill()
                answered = Counter(attacker.stdout.read().decode().split())
            found[name] = times, statuses, answered
            time.sleep(2.0)
        quiet += asyncio.run(honest(port, data, args.seconds / 2))[0]
    undisturbed = p99(quiet)
    print(f"{'undisturbed':32s} p99 {1000 * undisturbed:7.1f} ms, median {1000 * statistics.median(quiet):7.1f} ms")
    for name, (times, statuses, answered) in found.items():
        print(
            f"{name:32s} p99 {1000 * p99(times):7.1f} ms, ratio {p99(times) / undisturbed:5.2f} (<= {BAR:g}), "
            f"median {1000 * statistics.median(times):7.1f} ms, answers {dict(statuses)}, "
            f"the attacker's {dict(answered)}"
        )
    return int(any(p99(times) > BAR * undisturbed for times, _, _ in found.values()))


def p99(times: list[float]) -> float:
    """The 99th percentile."""
    return sorted(times)[int(0.99 * (len(times) - 1))]


if __name__ == "__main__":
    sys.exit(main())
