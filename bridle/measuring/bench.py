"""How fast the real step is: engine, loaders and copies as in a run, beside the machine's rate and ViTMAE's step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bridle.data.stream import MicroBatch
from bridle.measuring.reference import ViTMAEStep, is_installed
from bridle.measuring.workbench import Workbench
from bridle.training.checkpoints import Position
from bridle.training.clips import Delivered
from bridle.training.loop import PhaseRun
from bridle.training.machine import Product, seconds, stated_rate
from bridle.training.measures import Sums
from bridle.training.speed import StepTimes, peak_memory
from bridle.training.timing import PARTS

KERNELS = 10
WARM_UP = 2
"""Steps before the first that counts."""


@dataclass(frozen=True)
class Figures:
    """Of one phase, per rank but for `clips_per_second`; medians over rounds.

    parts: share of a step. share: achieved FLOP/s over the best product's in the same rounds; mfu: over the stated
    rate, none where none is known. memory: bytes, the most so far: on CUDA allocated by torch on the device, else
    resident of the process. padding: share of positions. reference: ViTMAE's share, none where it did not run.
    busy: share of a step in which a GPU computes; the rest it waits for the host; none on CPUs, and where no profile
    was taken. kernels: name and share of the time, of the device's where there is one.
    """

    phase: str
    micro_batch: int
    clips_per_second: float
    step_seconds: float
    parts: dict[str, float]
    flops_per_clip: float
    achieved: float
    best_product: float
    share: float
    mfu: float | None
    memory: int
    padding: float
    reference: float | None = None
    busy: float | None = None
    kernels: list[tuple[str, float]] = field(default_factory=list)


class Steps:
    """The real step of a phase, again and again."""

    def __init__(self, phase: PhaseRun) -> None:
        self.phase, self.device = phase, phase.ranks.device
        self.times, self.sums = StepTimes(phase.ranks), Sums(self.device)
        self.padded = self.positions = 0
        self._numbers, self._batches = count(), self._seen(phase.batches(Position()))
        self._delivered = Delivered(self._batches, phase.deliver)
        phase.engine.train()

    def __call__(self) -> None:
        """One optimizer step."""
        self.phase.step(next(self._numbers), self._delivered, self.times, self.sums)

    def reset(self) -> None:
        """Forgets times and sums."""
        self.times.reset()
        self.sums.reset()

    def close(self) -> None:
        """Ends the loaders and frees the engine."""
        self._batches.close()
        self.phase.engine.destroy()

    def _seen(self, batches: Iterator[MicroBatch]) -> Any:
        for batch in batches:
            self.padded += int(batch.tensors["padding"].sum())
            self.positions += len(batch.positions)
            yield batch
        return


def products(bench: Workbench, micro: int) -> list[Product]:
    """Of the encoder's perceptron at the size at hand, forwards and for the weights' gradient, and a square."""
    device, dtype = bench.ranks.device, torch.bfloat16 if bench.bf16 else torch.float32
    width, tokens = bench.recipe.model.encoder.width, micro * bench.flops.positions
    rows, wide, weights = (
        torch.randn(*shape, dtype=dtype, device=device)
        for shape in ((tokens, width), (tokens, 4 * width), (width, 4 * width))
    )
    square = torch.randn(2048, 2048, dtype=dtype, device=device)
    runs: list[Callable[[], object]] = [
        lambda: torch.mm(rows, weights), lambda: torch.mm(rows.T, wide), lambda: torch.mm(square, square),
    ]  # fmt: skip
    return [Product(run, device) for run in runs]


def bench_phase(bench: Workbench, index: int, rounds: int, steps: int, reference: bool, kernels: bool) -> Figures:
    """Measures phase `index`: in each round the products, `steps` steps, and a step of ViTMAE, in turns."""
    ranks, micro = bench.ranks, bench.recipe.train.micro_batch_size
    assert micro is not None
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    ours = Steps(bench.phase(index))
    for _ in range(WARM_UP):
        ours()
    memory = peak_memory(ranks.device)
    vit_mae = None
    if reference and is_installed():
        patch, grid = bench.make.patch, bench.flops.grid
        vit_mae = ViTMAEStep(bench.recipe, patch, grid, micro, bench.bf16, ranks.device)
        vit_mae()
    rates: list[list[float]] = [[] for _ in range(3)]
    parts: list[dict[str, float]] = []
    candidates = products(bench, micro)
    flops, clips = bench.flops.of_phase(index), bench.recipe.train.batch_size // ranks.world
    for _ in range(rounds):
        rates[0].append(max(product.rate() for product in candidates))
        ours.reset()
        took = seconds(ours, ranks.device, steps) / steps
        rates[1].append(flops * clips / took)
        parts.append({name: spent / steps / took for name, spent in ours.times.parts.seconds().items()})
        if vit_mae is not None:
            rates[2].append(vit_mae.flops / seconds(vit_mae, ranks.device))
    best, achieved = (statistics.median(found) for found in rates[:2])
    stated = stated_rate(ranks.device, bench.bf16)
    table, computing = _kernels(ours) if kernels else ([], 0.0)
    figures = Figures(
        phase=f"{index} {bench.recipe.phases[index].kind}",
        micro_batch=micro,
        clips_per_second=achieved / flops * ranks.world,
        step_seconds=flops * clips / achieved,
        parts={name: statistics.median(found[name] for found in parts) for name in PARTS},
        flops_per_clip=flops,
        achieved=achieved,
        best_product=best,
        share=achieved / best,
        mfu=None if stated is None else achieved / stated,
        memory=memory,
        padding=ours.padded / (ours.positions * bench.flops.positions),
        reference=statistics.median(rates[2]) / best if rates[2] else None,
        busy=computing * achieved / (flops * clips) if kernels and ranks.device.type == "cuda" else None,
        kernels=table,
    )
    ours.close()
    return figures


def _kernels(step: Steps) -> tuple[list[tuple[str, float]], float]:
    """The ten that take most of the time of one step, by their own time, and the seconds of all."""
    on_cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with profile(activities=activities, acc_events=True) as found:
        seconds(step, step.device)
    # An operation and the kernels that it starts both say that they took the device's time: only kernels count.
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    where = DeviceType.CUDA if on_cuda else DeviceType.CPU
    spent = {event.key: float(getattr(event, own)) for event in found.key_averages() if event.device_type == where}
    total = sum(spent.values()) or 1.0
    ranked = sorted(spent.items(), key=lambda item: -item[1])[:KERNELS]
    return [(name, took / total) for name, took in ranked], total / 1e6
