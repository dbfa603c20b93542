"""Weak scaling: clips/s of the real step on 1 and on 2 processes with the same micro-batch each, in turns.

    python benchmarks/weak_scaling.py [--recipe audio-mini] [--micro-batch 32] [--phase 1] [--turns 3] [--threads 1]

Each turn starts `bridle bench` anew on 1 process and on 2, of `--threads` threads; the machine needs twice as many idle
cores, and what they share (memory, caches, turbo) counts against the 2. Prints clips/s of each turn and the median of
clips/s on 2 over twice those on 1.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def clips_per_second(arguments: list[str], world: int, threads: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "bridle.cli", "bench", *arguments, "--json", str(figures)]
        places = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
            for rank in range(world)
        ]
        shared = {**os.environ, "OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1"}
        ranks = [subprocess.Popen(command, env=shared | place, stdout=subprocess.DEVNULL) for place in places]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit("a rank failed; what it printed says why")
        (phase,) = json.loads(figures.read_text())["phases"]
        return float(phase["clips_per_second"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="audio-mini")
    parser.add_argument("--micro-batch", default="32")
    parser.add_argument("--phase", default="1")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", default="5")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    given = [
        args.recipe, "data.workers=0", "--micro-batch", args.micro_batch, "--phase", args.phase, "--steps", args.steps,
        "--no-reference", "--no-kernels",
    ]  # fmt: skip
    ratios = []
    for turn in range(args.turns):
        one, two = (clips_per_second(given, world, args.threads) for world in (1, 2))
        ratios.append(two / (2 * one))
        print(f"turn {turn + 1}: {one:.2f} clips/s on 1, {two:.2f} on 2: {ratios[-1]:.3f}", flush=True)
    print(f"{args.recipe}: 2 processes reach {statistics.median(ratios):.3f} of twice one (median of {args.turns})")
