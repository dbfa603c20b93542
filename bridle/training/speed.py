"""How fast a window of steps was, over all ranks."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from bridle.training.ranks import Ranks
from bridle.training.timing import PARTS, PartTimes

BEFORE_OTHERS = 2
"""Of `PARTS`, those in which a rank waits for no other one; with ZeRO stage 3 it may."""


@dataclass(frozen=True)
class Rate:
    """flops: of one clip (see `bridle.training.flops`); peak: FLOP/s of a rank that MFU counts against."""

    flops: float
    peak: float


class StepTimes:
    """Times of the steps since the last row."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.parts = PartTimes(ranks.device)
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.start = time.perf_counter()
        self.parts.reset()
        self.steps = 0

    def rates(self, batch_size: int, rate: Rate) -> dict[str, float]:
        """What a row says of speed; see docs/training.md, "Metrics". All ranks must call it, when a row is due."""
        spent = [self.parts.seconds()[part] for part in PARTS]
        seconds = max(time.perf_counter() - self.start, 1e-9)
        measured = [*spent, seconds, peak_memory(self.ranks.device)]
        mine = torch.tensor(measured, dtype=torch.float64, device=self.ranks.device)
        table = self.ranks.gather(mine[None]).cpu()
        shares = table[:, : len(PARTS)] / table[:, len(PARTS), None]  # of a rank's own time: ranks begin a row apart
        clips, alone = self.steps * batch_size / seconds, table[:, :BEFORE_OTHERS].sum(1)
        achieved = clips * rate.flops / self.ranks.world
        return {
            "samples_per_second": clips,
            "step_seconds": seconds / max(1, self.steps),
            **dict(zip(PARTS, shares.mean(0).tolist(), strict=True)),
            "straggling": float(alone.max() / alone.quantile(0.5).clamp(min=1e-9)),
            "memory_bytes": float(table[:, -1].max()),
            "flops_per_second": achieved,
            "mfu": achieved / rate.peak,
        }


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: on CUDA of the device by torch's tensors, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
