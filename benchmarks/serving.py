"""How much of a bare loop's speed the service keeps, and how it compares with LitServe.

    python benchmarks/serving.py MODEL_DIR FILE ... [--rounds 5] [--seconds 10] [--threads 2] [--memory-requests 20000]
    python benchmarks/serving.py --small [--rounds 5] [--seconds 10]

`--small` makes its model (64 x 64 pixels, tiny, 2 ms a picture) and its pictures (JPEGs of 128 x 128): what a request
itself costs, which with a model of 60 ms a picture nobody sees.

In one run, with one model and the same files, in rotated rounds: a bare loop (windows, stack, model; its best batch),
`bridle serve` (its best largest batch, else its defaults) and LitServe (its best workers, batch and timeout) with
closed-loop clients, the service with open-loop arrivals at 60 % of its capacity, and the service when idle. An item is
a window of the model's size. CPU is that of the server's processes, never the clients'. Prints medians over the rounds,
and ratios beside what they should be. On a machine that others use, trust the CPU times and the ratios, not the rates.

The clients are one process of raw sockets, so that on a small machine they cost as little as they can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from http_load import Running, closed_loop, free_port, open_loop

BATCHES = (1, 4, 8, 32)
SERVICE = (2, 8, 0)
"""Largest batch; 0 leaves it to the service."""
LITSERVE = ((1, 8, 0.0), (1, 8, 0.01), (1, 4, 0.01), (2, 8, 0.0), (2, 8, 0.01), (2, 4, 0.01), (2, 2, 0.0), (2, 2, 0.01))
"""Workers, which share the threads, largest batch, and seconds to wait for it."""
CLIENTS = (1, 8, 32)


def main() -> None:
    args = _arguments()
    if args.bare:
        _bare(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.small:
            args.model, args.files = small_case(Path(scratch))
        _compare(args)


def _compare(args: argparse.Namespace) -> None:
    rounds: list[dict[str, float]] = []
    bares = tuple((batch, threads) for batch in BATCHES for threads in dict.fromkeys((1, args.threads)))
    bare = _best(bares, lambda setting: _run_bare(args, *setting, args.seconds)["rate"])
    largest = _best(SERVICE, lambda batch: _measure_service(args, batch, args.seconds, (32,))["service_rate_32"])
    best = _best(LITSERVE, lambda setting: _measure_litserve(args, setting, args.seconds)["litserve_rate"])
    print(
        json.dumps({"bare_batch_threads": bare, "service_max_batch": largest, "litserve_workers_batch_wait": best}),
        flush=True,
    )
    for number in range(args.rounds):
        steps: list[Callable[[], dict[str, float]]] = [
            lambda: _measure_bare(args, *bare),
            lambda: _measure_service(args, largest, args.seconds, CLIENTS),
            lambda: _measure_litserve(args, best, args.seconds),
        ]
        found: dict[str, float] = {}
        for turn in range(len(steps)):
            found |= steps[(turn + number) % len(steps)]()
        rounds.append(found)
        print(json.dumps({"round": number, **{name: round(value, 5) for name, value in found.items()}}), flush=True)
    _report(args.small, {name: statistics.median(one[name] for one in rounds) for name in rounds[0]})
    if args.memory_requests:
        _measure_memory(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--small", action="store_true", help="a model and pictures of its own, both small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of the bare loop; LitServe's workers share as many"
    )
    parser.add_argument("--memory-requests", type=int, default=0, help="also send so many, and print memory on the way")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small == bool(args.files):
        parser.error("give a model folder and files, or --small")
    return args


def small_case(folder: Path) -> tuple[str, list[str]]:
    """A model folder of 64 x 64 pixels, and six pictures of 128 x 128."""
    import io

    from capacity import write_random
    from PIL import Image

    from bridle.data.shards import open_shards

    shards = open_shards(["builtin:image"], extensions=("jpg",))
    files = []
    for index in range(6):
        picture = Image.open(io.BytesIO(shards.read(index).data)).convert("RGB").resize((128, 128))
        files.append(str(folder / f"{index}.jpg"))
        picture.save(files[-1], quality=90)
    return str(write_random("image-mini", folder / "model", size=[64, 64], patch=[16, 16])), files


def _best(choices: tuple[Any, ...], rate: Callable[[Any], float]) -> Any:
    return max(choices, key=rate)


def _report(small: bool, median: dict[str, float]) -> None:
    print(json.dumps({"medians": {name: round(value, 5) for name, value in median.items()}}))
    rows = (
        [
            ("throughput, 32 clients / bare loop", median["service_rate_32"] / median["bare_rate"], ">= 0.6"),
            ("throughput, 32 clients / LitServe", median["service_rate_32"] / median["litserve_rate"], ""),
            ("CPU per item, 32 clients / bare loop", median["service_cpu_32"] / median["bare_cpu"], ""),
            (
                "CPU beyond the bare loop's, 32 clients, ms",
                1000 * (median["service_cpu_32"] - median["bare_cpu"]),
                "<= 1.2",
            ),
            (
                "CPU beyond the bare loop's, 1 client, ms",
                1000 * (median["service_cpu_1"] - median["bare_one_cpu"]),
                "<= 3",
            ),
            ("  of which the HTTP process', 32 clients, ms", 1000 * median["service_http_32"], ""),
            ("  of which the HTTP process', 1 client, ms", 1000 * median["service_http_1"], ""),
            ("added latency, 1 client, ms", 1000 * (median["service_median_1"] - median["bare_one"]), ""),
        ]
        if small
        else [
            ("throughput, 32 clients / bare loop", median["service_rate_32"] / median["bare_rate"], ">= 0.95"),
            ("throughput, 32 clients / LitServe", median["service_rate_32"] / median["litserve_rate"], ">= 1.05"),
            ("CPU per item, 32 clients / bare loop", median["service_cpu_32"] / median["bare_cpu"], "<= 1.10"),
            ("added latency, 1 client, ms", 1000 * (median["service_median_1"] - median["bare_one"]), "< 5"),
            ("p99 at 60 % / batch-1 time", median["service_open_p99"] / median["bare_one"], "<= 3"),
            ("idle CPU, % of a core", 100 * median["service_idle_cpu"], "< 1"),
        ]
    )
    for name, value, bar in rows:
        print(f"{name:40s} {value:8.3f}   {bar}")


# The bare loop.


def _bare(args: argparse.Namespace) -> None:
    import torch

    import bridle

    torch.set_num_threads(args.threads)
    model = bridle.load(args.model)
    contents = [Path(file).read_bytes() for file in args.files]
    waiting: list[Any] = []
    done, turn, times = 0, 0, []
    for warm in (True, False):
        began, cpu = time.perf_counter(), _own_cpu()
        done = 0
        end = began + (1.0 if warm else args.seconds)
        while time.perf_counter() < end:
            start = time.perf_counter()
            for clip in model.modality.windows(contents[turn % len(contents)]):
                waiting.append(clip.values)
                if len(waiting) == args.batch:
                    model.codes(torch.stack(waiting)).cpu().tolist()
                    done += len(waiting)
                    waiting.clear()
            turn += 1
            times.append(time.perf_counter() - start)
    seconds = time.perf_counter() - began
    result = {"rate": done / seconds, "cpu": (_own_cpu() - cpu) / done, "median": statistics.median(times)}
    print(json.dumps(result))


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _run_bare(args: argparse.Namespace, batch: int, threads: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, args.model, *args.files, "--bare", f"--batch={batch}"]
    command += [f"--seconds={seconds}", f"--threads={threads}"]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def _measure_bare(args: argparse.Namespace, batch: int, threads: int) -> dict[str, float]:
    best = _run_bare(args, batch, threads, args.seconds)
    alone = min(
        (_run_bare(args, 1, count, args.seconds / 2) for count in dict.fromkeys((1, args.threads))),
        key=lambda found: found["median"],
    )
    return {
        "bare_rate": best["rate"],
        "bare_cpu": best["cpu"],
        "bare_one": alone["median"],
        "bare_one_cpu": alone["cpu"],
    }


# The services.


def _measure_service(
    args: argparse.Namespace, max_batch: int, seconds: float, clients: tuple[int, ...]
) -> dict[str, float]:
    port = free_port()
    command = [sys.executable, "-m", "bridle.cli", "serve", args.model, f"--port={port}", "--lame-duck-seconds=0"]
    found: dict[str, float] = {}
    with Running([*command, f"--max-batch={max_batch}", "--log-level=warning"], port, "/readyz") as server:
        requests = _raw_requests(args, port, "/tokenize")
        asyncio.run(closed_loop(port, requests, 8, 2.0))
        for count in clients:
            cpu, own = server.cpu(), server.own_cpu()
            times, items, took = asyncio.run(closed_loop(port, requests, count, seconds))
            found[f"service_http_{count}"] = (server.own_cpu() - own) / items
            found[f"service_rate_{count}"] = items / took
            found[f"service_cpu_{count}"] = (server.cpu() - cpu) / items
            found[f"service_median_{count}"] = statistics.median(times)
        if clients != CLIENTS:
            return found
        per_request = items / len(times)
        rate = 0.6 * max(found[f"service_rate_{count}"] for count in clients) / per_request
        times = asyncio.run(open_loop(port, requests, rate, seconds))
        found["service_open_p99"] = sorted(times)[int(0.99 * (len(times) - 1))]
        cpu, began = server.cpu(), time.perf_counter()
        time.sleep(seconds)
        found["service_idle_cpu"] = (server.cpu() - cpu) / (time.perf_counter() - began)
    return found


def _measure_litserve(args: argparse.Namespace, setting: tuple[int, int, float], seconds: float) -> dict[str, float]:
    port, (workers, batch, wait) = free_port(), setting
    program = str(Path(__file__).with_name("serving_litserve.py"))
    numbers = (port, batch, wait, max(1, args.threads // workers), workers)
    command = [sys.executable, program, args.model, *map(str, numbers)]
    with Running(command, port, "/health") as server:
        requests = _raw_requests(args, port, "/predict")
        asyncio.run(closed_loop(port, requests, 8, 2.0))
        cpu = server.cpu()
        _, items, took = asyncio.run(closed_loop(port, requests, 32, seconds))
        return {"litserve_rate": items / took, "litserve_cpu": (server.cpu() - cpu) / items}


def _raw_requests(args: argparse.Namespace, port: int, path: str) -> list[tuple[bytes, int]]:
    """Each file as a whole HTTP request, and how many windows it has."""
    import bridle

    modality = bridle.load(args.model).modality
    requests = []
    for file in args.files:
        content = Path(file).read_bytes()
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + content + b"\r\n--b--\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: {len(part)}\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        requests.append((head.encode() + part, sum(1 for _ in modality.windows(content))))
    return requests


def _measure_memory(args: argparse.Namespace) -> None:
    port = free_port()
    command = [sys.executable, "-m", "bridle.cli", "serve", args.model, f"--port={port}", "--log-level=warning"]
    with Running(command, port, "/readyz") as server:
        requests = _raw_requests(args, port, "/tokenize")
        sent = 0
        while sent < args.memory_requests:
            times, _, _ = asyncio.run(closed_loop(port, requests, 8, 10.0))
            sent += len(times)
            print(json.dumps({"requests": sent, "memory_mb": round(server.memory() / 1e6, 1)}), flush=True)


if __name__ == "__main__":
    main()
