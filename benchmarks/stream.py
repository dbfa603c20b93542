"""What the stream costs: ``python benchmarks/stream.py [--rounds 15] [--samples 640]``.

Medians over many short rounds of the ratio within a round, since a shared disk changes its speed by the second; the
rounds rotate who goes first, on the same tars, one process each but for the workers named:

- the stream without decoding (order, index, read, generator, micro-batches) over a bare sequential read of the samples
  (`tarfile`, member after member), with the tars on disk only and in the page cache; target at least 0.8. WebDataset's
  own reading is shown too, and, as the ceiling, the files in blocks of 1 MiB without finding a sample in them;
- the stream with the audio modality's training clips over the same decoding, in this process, of bytes that lie in
  memory; target at least 0.9.

The tars hold the shipped recordings as 16 kHz 16-bit wav, repeated to 10 s (320 KB), or cut to 2 s (64 KB). Rates count
from the first micro-batch: starting loader processes takes its tenth of a second once in a phase.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import webdataset

from bridle.data.shards import ShardSet, open_shards
from bridle.data.stream import Make, Stream
from bridle.data.writer import Planned, write_shard
from bridle.modalities import build_modality
from bridle.modalities.clip import Modality

RATE = 16_000
SHARDS = 4
BATCH = 32
DECODED = 256
"""Samples of a round with decoding, which is slower by far."""
Run = Callable[[], float]


def main() -> int:
    """Prints samples per second and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--folder", help="where the tars are written (the system's folder for such)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seconds in (10, 2):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            shards = _tars(Path(folder), seconds, args.samples)
            for state, prepare in (("from disk", _forget), ("from the page cache", _nothing)):
                runs: dict[str, Run] = {
                    "tarfile, in order": partial(_read, shards, prepare, _members),
                    "webdataset, in order": partial(_read, shards, prepare, _webdataset),
                    "blocks of 1 MiB": partial(_read, shards, prepare, _blocks),
                }
                for workers in (0, 1, 2):
                    name = f"stream, {workers} workers"
                    runs[name] = partial(_stream, shards, _length, args.samples, workers, prepare)
                _compare(f"{seconds} s wav {state}, no decoding", args.rounds, runs)
            if seconds == 10:
                _compare(f"{seconds} s wav, training clips", args.rounds, _decoding_runs(shards))
    return 0


def _decoding_runs(shards: ShardSet) -> dict[str, Run]:
    clip = partial(_clip, build_modality("audio", {}))
    held = [shards.read(i).data for i in range(DECODED)]
    runs: dict[str, Run] = {"decoding alone": partial(_decode, held, clip)}
    for workers in (0, 1, 2):
        runs[f"stream, {workers} workers"] = partial(_stream, shards, clip, DECODED, workers, _nothing)
    return runs


def _tars(folder: Path, seconds: int, samples: int) -> ShardSet:
    shipped = open_shards(["builtin:audio"], extensions=["flac", "ogg"])
    for number in range(SHARDS):
        planned = []
        for i in range(number, samples, SHARDS):
            sound, _ = soundfile.read(io.BytesIO(shipped.read(i % len(shipped)).data), dtype="int16", always_2d=True)
            source = folder / f"{i}.wav"
            soundfile.write(source, np.resize(sound[:, 0], seconds * RATE), RATE)
            planned.append(Planned(f"{i:06d}", source, "wav", source.stat().st_size, {"label": "x"}))
        write_shard(folder / f"{number}.tar", planned)
        for sample in planned:
            sample.source.unlink()
    return open_shards([f"{folder}/*.tar"], extensions=["wav"])


def _forget(shards: ShardSet) -> None:
    """Takes the tars out of the page cache."""
    for shard in shards.shards:
        handle = os.open(shard.url, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _nothing(_: ShardSet) -> None:
    """They stay where they are."""


def _length(data: bytes, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {"bytes": torch.tensor(len(data))}


def _clip(modality: Modality, data: bytes, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {"values": modality.training_clip(data, rng).values}


def _read(shards: ShardSet, prepare: Callable[[ShardSet], None], read: Callable[[ShardSet], None]) -> float:
    prepare(shards)
    began = time.perf_counter()
    read(shards)
    return len(shards) / (time.perf_counter() - began)


def _members(shards: ShardSet) -> None:
    for shard in shards.shards:
        with tarfile.open(shard.url, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                content.read()


def _webdataset(shards: ShardSet) -> None:
    for _ in webdataset.WebDataset([shard.url for shard in shards.shards], shardshuffle=False, empty_check=False):
        pass


def _blocks(shards: ShardSet) -> None:
    for shard in shards.shards:
        with Path(shard.url).open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def _stream(shards: ShardSet, make: Make, samples: int, workers: int, prepare: Callable[[ShardSet], None]) -> float:
    prepare(shards)
    stream = Stream(shards, make, seed=0, block=16, window=64)
    shares = {"batch_size": BATCH, "micro_batch_size": BATCH, "rank": 0, "world": 1, "workers": workers}
    batches = stream.micro_batches(start=0, stop=samples, **shares)
    next(batches)
    began = time.perf_counter()
    counted = sum(len(batch.positions) for batch in batches)
    return counted / (time.perf_counter() - began)


def _decode(held: list[bytes], make: Make) -> float:
    began = time.perf_counter()
    for first in range(0, len(held), BATCH):
        numbers = range(first, min(first + BATCH, len(held)))
        made = [make(held[i], np.random.default_rng((0, 0, i))) for i in numbers]
        torch.stack([sample["values"] for sample in made])
    return len(held) / (time.perf_counter() - began)


def _compare(title: str, rounds: int, runs: dict[str, Run]) -> None:
    """Median rate of each, and the median (and quartiles) of its ratio to the first one's of the same round."""
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rates[name].append(runs[name]())
    base = np.array(rates[names[0]])
    print(f"{title}: {names[0]} {statistics.median(base):,.0f} samples/s", flush=True)
    for name in names[1:]:
        low, middle, high = np.percentile(np.array(rates[name]) / base, (25, 50, 75))
        rate = statistics.median(rates[name])
        print(f"  {name}: {rate:,.0f} samples/s, ratio {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
