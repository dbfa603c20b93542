"""Memory that sample places take: bytes of private memory a sample in each loader process, and once a machine.

    python benchmarks/tables.py [--samples 400000] [--shards 40] [--processes 4] [--folder /tmp]

Makes tars of tiny samples, has each process read one sample of every shard, as a loader has done after some windows,
and compares its private memory (USS) with that before. Beside it: tables of each process's own, which is what loaders
have where the cache cannot be written, and had before the file was shared.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

WORKER = """
import gc, json, sys, psutil
from bridle.data.shards import open_shards
shards = open_shards([sys.argv[1]], extensions=["wav"], cache=sys.argv[2])
gc.collect()
before = psutil.Process().memory_full_info().uss
print(json.dumps(len(shards)), flush=True)
step = max(1, len(shards) // len(shards.shards))
for i in range(0, len(shards), step):
    shards.data(i)
gc.collect()
found = psutil.Process().memory_full_info()
print(json.dumps((found.uss - before) / len(shards)), flush=True)
sys.stdin.readline()
"""


def make_shards(folder: Path, shards: int, samples: int) -> None:
    for number in range(shards):
        with tarfile.open(folder / f"s-{number:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(samples // shards):
                member = tarfile.TarInfo(f"{number:06}/clip-{i:08}.wav")
                member.size = 8
                tar.addfile(member, io.BytesIO(b"12345678"))


def measure(folder: Path, cache: Path, processes: int) -> list[float]:
    """Private bytes a sample of processes that are all alive, one after another."""
    command = [sys.executable, "-c", WORKER, str(folder / "*.tar"), str(cache)]
    workers, found = [], []
    for _ in range(processes):
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers.append(worker)
        assert worker.stdout is not None
        worker.stdout.readline()
        found.append(float(json.loads(worker.stdout.readline())))
    for worker in workers:
        worker.communicate("\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_shards(folder, args.shards, args.samples)
        (folder / "file").write_bytes(b"")
        own, shared = (measure(folder, folder / place, args.processes) for place in ("file", "cache"))
        (table,) = (folder / "cache" / "tables").iterdir()
        print(f"{args.samples} samples in {args.shards} shards; private bytes a sample, process by process")
        print("  tables of their own:", " ".join(f"{value:.1f}" for value in own))
        print("  one shared file:    ", " ".join(f"{value:.1f}" for value in shared))
        print(f"  the file, once a machine: {table.stat().st_size / args.samples:.1f} bytes a sample")
