"""Thousands of mutated files and mutated requests: no 5xx, no hang, no worker lost, memory within its bound.

    python benchmarks/serving_fuzz.py MODEL_DIR FILE ... [--requests 5000] [--seed 0]

Starts `bridle serve`, sends, and exits with 1 if any of that does not hold. 503 is counted as a failure too.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from http_load import Running, free_port

CLIENTS = 8
GROWTH = 300e6
"""Bytes that all processes together may grow by."""


JSON = b'{"clips": [{"codes": [[1, 2, 3], [4, 5, 6]]}, {"codes": [[7]]}]}'


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, codes_0=np.arange(6).reshape(2, 3), codes_1=np.ones((1, 4), np.int32))
    return file.getvalue()


NPZ = _npz()


def mutated_file(rng: random.Random, contents: list[bytes]) -> bytes:
    """A real file with bytes changed, cut, doubled or joined."""
    data = bytearray(rng.choice(contents))
    for _ in range(rng.choice((1, 3, 30, 300))):
        place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))
        data[place] = rng.randrange(256)
    if rng.random() < 0.25:
        del data[rng.randrange(1, len(data)) :]
    if rng.random() < 0.1:
        data += rng.choice(contents)
    return bytes(data)


def request(rng: random.Random, contents: list[bytes]) -> bytes:
    """A whole request: half are well-formed with a mutated file, half are mutated themselves."""
    path = rng.choice(("/tokenize", "/tokenize?layout=delay", "/encode", "/dequantize", "/v1/picture"))
    body = mutated_file(rng, contents)
    kind = rng.choice(
        ("application/octet-stream", "multipart/form-data; boundary=b", "application/json", "application/x-npz")
    )
    if kind.startswith("multipart"):
        body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + body + b"\r\n--b--\r\n"
    if path == "/dequantize" and rng.random() < 0.8:
        kind, body = rng.choice((("application/json", JSON), ("application/x-npz", NPZ)))
        if rng.random() < 0.5:
            body = mutated_file(rng, [body])
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n".encode()
    whole = bytearray(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 4, 16))):
            whole[rng.randrange(min(len(whole), len(head) + 200))] = rng.randrange(256)
    return bytes(whole)


async def send(port: int, data: bytes) -> int:
    """The status of the answer; 0 where the service closed the connection instead, -1 where it hung."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(90):
            writer.write(data)
            line = await reader.readline()
            await reader.read()
            return int(line.split()[1]) if line.startswith(b"HTTP/") else 0
    except TimeoutError:
        return -1
    except (ConnectionError, IndexError):
        return 0
    finally:
        writer.close()


async def fuzz(port: int, contents: list[bytes], count: int, seed: int) -> Counter[int]:
    """Sends `count` requests, some beside each other."""
    rng = random.Random(seed)
    statuses: Counter[int] = Counter()
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            statuses[await send(port, request(rng, contents))] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    port = free_port()
    contents = [Path(file).read_bytes() for file in args.files]
    command = [sys.executable, "-m", "bridle.cli", "serve", args.model, f"--port={port}", "--log-level=error"]
    command += ["--body-idle-timeout=1", "--header-timeout=1", "--decode-seconds=10", "--lame-duck-seconds=0"]
    with Running(command, port, "/readyz") as server:
        asyncio.run(fuzz(port, contents, 200, args.seed + 1))
        memory, processes = server.memory(), len(server.family())
        statuses = asyncio.run(fuzz(port, contents, args.requests, args.seed))
        grown, left = server.memory() - memory, len(server.family())
        well = asyncio.run(send(port, b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) == 200
    bad = sum(count for status, count in statuses.items() if status >= 500 or status < 0)
    found = {"statuses": dict(sorted(statuses.items())), "bad": bad, "grown_mb": round(grown / 1e6, 1)}
    print(json.dumps(found | {"processes": [processes, left], "ready": well}))
    return int(bool(bad) or grown > GROWTH or left != processes or not well)


if __name__ == "__main__":
    sys.exit(main())
