"""The largest micro-batch that fits and the fastest, found by taking real steps at one size after the other."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bridle.config import Recipe
from bridle.measuring.bench import WARM_UP, Steps
from bridle.measuring.workbench import Workbench, trained_phases, with_batch
from bridle.training.machine import seconds
from bridle.training.ranks import Ranks
from bridle.training.speed import peak_memory


@dataclass(frozen=True)
class Trial:
    """One size. clips_per_second: of each phase that trains, none where it did not fit. memory: bytes, the most so far
    (see `bridle.training.speed.peak_memory`). fault: why it does not fit; empty where it does."""

    micro_batch: int
    clips_per_second: list[float]
    memory: int
    fault: str = ""

    def recipe_seconds(self, weights: list[float]) -> float:
        """Seconds a clip over all phases, each as often as its length says."""
        return sum(weight / rate for weight, rate in zip(weights, self.clips_per_second, strict=True))


def sizes(recipe: Recipe, ranks: int, least: int) -> list[int]:
    """Micro-batches that divide a rank's clips of a step, from `least` on."""
    clips = recipe.train.batch_size // ranks
    return [size for size in range(least, clips + 1) if clips % size == 0]


def lengths(recipe: Recipe) -> list[float]:
    """How long each phase that trains is against the others; 1 each where some count steps and some epochs."""
    phases = [recipe.phases[index] for index in trained_phases(recipe)]
    for unit in ("steps", "epochs"):
        found = [getattr(phase, unit) for phase in phases]
        if None not in found:
            return [float(length) for length in found]
    return [1.0] * len(phases)


def trials(
    recipe: Recipe, given: Mapping[str, Any], where: str, ranks: Ranks, folder: Path,
    candidates: list[int], rounds: int, limit: float,
) -> Iterator[Trial]:  # fmt: skip
    """Tries sizes in rising order, and ends with the first that does not fit.

    limit: bytes of host memory that a size on a CPU may come to take; it is told from the growth between the two sizes
    before, so that nothing is ended by the kernel. A GPU says itself that it is full.
    """
    taken: list[tuple[int, int]] = []
    for micro in candidates:
        if ranks.device.type == "cpu" and len(taken) > 1 and (needed := _foreseen(taken, micro)) > limit:
            yield Trial(micro, [], taken[-1][1], f"would take about {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}")
            return
        bench = Workbench(with_batch(recipe, micro, 1, ranks.world), given, where, ranks, folder)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        try:
            found = [_rate(bench, index, rounds) for index in trained_phases(recipe)]
        except torch.OutOfMemoryError:
            yield Trial(micro, [], peak_memory(ranks.device), "out of the GPU's memory")
            return
        taken.append((micro, peak_memory(ranks.device)))
        yield Trial(micro, found, taken[-1][1])


def host_limit() -> float:
    """Bytes that this process may come to take, as far as the machine has them."""
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _rate(bench: Workbench, index: int, rounds: int) -> float:
    """Clips/s of a phase, the median of so many steps."""
    steps = Steps(bench.phase(index))
    try:
        for _ in range(WARM_UP):
            steps()
        took = statistics.median(seconds(steps, bench.ranks.device) for _ in range(rounds))
    finally:
        steps.close()
        del steps
        gc.collect()
        if bench.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return bench.recipe.train.batch_size / took


def _foreseen(taken: list[tuple[int, int]], micro: int) -> float:
    """Memory at a size, on the line through the two before."""
    (before, less), (last, more) = taken[-2:]
    return more + (more - less) / (last - before) * (micro - last)
