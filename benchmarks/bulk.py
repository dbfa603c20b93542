"""Bulk tokenization against the bare batched decode-plus-model loop, and against a plain Ray Data map_batches.

    python benchmarks/bulk.py [--modality audio image video] [--shards 2] [--times 8] [--rounds 5] [--ray]

The bare loop decodes file after file, batches windows across files and calls the model: no outputs, no hashes, no
restarts. Both get one torch thread and decode in their own process: the same work on the same core. Rounds take
turns, and medians count. CPU seconds are steadier than the clock on a busy machine; both are printed. Last, the peak
memory of a process that does S and 4 S shards. Models have random weights at the size of the shipped mini recipes, a
shard is the built-in training sample several times (8 times: 840 sounds, 2,576 pictures, 1,200 films); with `--times 1`
what a shard costs by itself, such as its file, its hashes and its claim, weighs more than in shards of any use.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bridle
from bridle.config import load_recipe
from bridle.data.patterns import expand
from bridle.data.shards import open_shards
from bridle.modalities import build_modality
from bridle.model_folder import BridleModel, patch_shape, save_model
from bridle.modeling.bridle import Components
from bridle.tokens.bulk import BATCH, Settings, finish, prepare
from bridle.tokens.job import Job
from bridle.tokens.stage import Tokenizer
from bridle.tokens.state import State


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--modality", nargs="+", default=["audio", "image", "video"])
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--times", type=int, default=8, help="the sample, so often in each shard (default: 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray", action="store_true", help="also a plain Ray Data map_batches (needs bridle[ray])")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "SHARDS", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        bulk(
            bridle.load(arguments.child[0]),
            sorted(map(str, Path(arguments.child[1]).glob("*.tar"))),
            arguments.child[2],
        )
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    for modality in arguments.modality:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"modality": modality, **measure(modality, Path(folder), arguments)}))


def measure(modality: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model = bridle.load(write_model(folder / "model", modality))
    shards = copies(modality, folder / "few", arguments.shards, arguments.times)
    samples = len(open_shards(shards, extensions=model.modality.extensions))
    ways: dict[str, Callable[[], float | None]] = {
        "bare": lambda: bare(model, shards),
        "bulk": lambda: bulk(model, shards, str(fresh(folder / "out"))),
    }
    if arguments.ray:
        ways["ray"] = lambda: ray_map_batches(str(folder / "model"), shards, model)
    clock: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    ways["bulk"]()
    for turn in range(arguments.rounds):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, used = time.perf_counter(), time.process_time()
            seconds = ways[name]()
            clock[name].append(time.perf_counter() - wall if seconds is None else seconds)
            cpu[name].append(time.process_time() - used)
    found: dict[str, Any] = {f"{name}_per_second": samples / statistics.median(clock[name]) for name in ways}
    for name in ways:
        if name != "bulk":
            ratios = [other / own for own, other in zip(clock["bulk"], clock[name], strict=True)]
            found[f"bulk_over_{name}"] = statistics.median(ratios)
    found["bulk_over_bare_cpu"] = statistics.median(cpu["bare"]) / statistics.median(cpu["bulk"])
    found["peak_mb"] = peak(folder, "few")
    copies(modality, folder / "many", 4 * arguments.shards, arguments.times)
    found["peak_mb_of_4_times_the_shards"] = peak(folder, "many")
    return found


def bare(model: BridleModel, shards: list[str]) -> None:
    """Windows batched across the files of all shards; codes are dropped."""
    found = open_shards(shards, extensions=model.modality.extensions)
    for _ in Tokenizer(model, BATCH["cpu"])(found.data(i) for i in range(len(found))):
        pass


def bulk(model: BridleModel, shards: list[str], out: str) -> None:
    """A whole job: outputs, hashes, manifest."""
    prepared = prepare(model, shards, out, Settings())
    state = State(prepared, max_corrupt=0.1)
    finish(prepared, Job(state, model, workers=0).run())


class _Plain:
    """What a user would write: one batch of files at a time."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.model = bridle.load(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        codes = [self.model.tokenize(data).codes.numpy().tobytes() for data in batch["bytes"]]
        return {"codes": codes, "began": [began] * len(codes), "ended": [time.time()] * len(codes)}


def ray_map_batches(folder: str, shards: list[str], model: BridleModel) -> float:
    """Seconds from one actor's first batch to its last, so that its start does not count; the files are put into the
    object store first."""
    import ray

    ray.init(ignore_reinit_error=True, num_cpus=2, include_dashboard=False, log_to_driver=False)
    found = open_shards(shards, extensions=model.modality.extensions)
    rows = [{"bytes": found.data(i)} for i in range(len(found))]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 256)).map_batches(
        _Plain, fn_constructor_args=(folder,), concurrency=1, num_cpus=1, batch_size=32
    )
    times = [(row["began"], row["ended"]) for row in dataset.iter_rows()]
    return float(max(ended for _, ended in times) - min(began for began, _ in times))


def peak(folder: Path, shards: str) -> float:
    """Peak resident megabytes of a process that tokenizes a folder of shards."""
    command = [
        sys.executable,
        __file__,
        "--child",
        str(folder / "model"),
        str(folder / shards),
        str(fresh(folder / "o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def copies(sample: str, folder: Path, count: int, times: int) -> list[str]:
    """A built-in sample `times` over in each of several shards."""
    folder.mkdir()
    (source,) = expand([f"builtin:{sample}"])
    first = folder / "s0000.tar"
    with tarfile.open(source) as given, tarfile.open(first, "w") as made:
        for turn in range(times):
            for member in given:
                content = given.extractfile(member)
                assert content is not None
                again = tarfile.TarInfo(f"{turn}-{member.name}")
                again.size = member.size
                made.addfile(again, content)
    return [str(first), *(str(shutil.copy(first, folder / f"s{i:04d}.tar")) for i in range(1, count))]


def write_model(folder: Path, modality: str) -> Path:
    """The mini recipe's model with random weights."""
    recipe = load_recipe(f"{modality}-mini")
    shaped = build_modality(recipe.modality, recipe.clip)
    components = Components(recipe.model, patch_shape(shaped))
    tokenizer = components.tokenizer(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer.quantizer.initialize(torch.randn(2048, recipe.model.quantizer.dim, generator=generator), generator)
    save_model(
        folder, name=f"{modality}-bench", modality=modality, clip=shaped.settings.model_dump(mode="json"),
        encoder_settings=recipe.model.encoder, quantizer_settings=recipe.model.quantizer,
        encoder=components.encoder(0).state_dict(), tokenizer=tokenizer.state_dict(), learned=True, trained={},
    )  # fmt: skip
    return folder


if __name__ == "__main__":
    main()
