"""What a phase measures: sums over a window of steps, and held-out clips."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bridle.config import DataSettings, TrainSettings
from bridle.data.stream import MicroBatch, Stream
from bridle.evaluation.codebooks import code_usage_rate, perplexity
from bridle.training.clips import Delivery
from bridle.training.engine import split_batch
from bridle.training.phases import Means, Metrics, PhaseJob
from bridle.training.ranks import Ranks
from bridle.training.stopping import StopRequest
from bridle.training.watchdog import Watchdog

log = logging.getLogger("bridle")
NAMED = 8
"""Clips of a batch that a message names, at most."""


class Sums:
    """Sums of metrics on the device, as one vector; the host looks at them only when a row is due."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(0, device=device)
        self.batches = 0
        self._shapes: dict[str, torch.Size] = {}
        """Of the metrics, in the order of `values`; known from the first micro-batch on."""
        self.corrupt = 0
        self._seen: list[tuple[Tensor, list[int]]] = []

    def add(self, metrics: Metrics, batch: MicroBatch) -> None:
        """Takes over one micro-batch's metrics, the same ones each time."""
        if not self._shapes:
            self._shapes = {name: value.shape for name, value in metrics.items()}
        row = torch.cat([value.reshape(-1) for value in metrics.values()])
        if not len(self.values):
            self.values = torch.zeros_like(row)
        self.values += row
        self.batches += 1
        self._seen.append((row, batch.positions))
        for sample in batch.corrupt:
            log.warning("corrupt sample replaced: %s, key %s: %s", sample.shard, sample.key, sample.error)
        self.corrupt += len(batch.corrupt)

    def reduce(self, ranks: Ranks) -> tuple[Means, int]:
        """Means over all ranks by name, and corrupt samples of all ranks."""
        *totals, batches, corrupt = ranks.sum(self._row()).tolist()
        left = iter([total / batches for total in totals])
        means: Means = {
            name: list(islice(left, shape[0])) if shape else next(left) for name, shape in self._shapes.items()
        }
        return means, int(corrupt)

    def reset(self) -> None:
        """Begins a new window."""
        self.values.zero_()
        self.batches = self.corrupt = 0
        self._seen.clear()

    def first_not_finite(self, ranks: Ranks) -> list[int]:
        """Positions of the first micro-batch, over all ranks, whose metrics are no numbers; at most `NAMED` of them.

        All ranks must call it.
        """
        found: list[int] = []
        for number, (row, positions) in enumerate(self._seen):
            if not row.isfinite().all():
                found = [number, *positions[:NAMED]]
                break
        mine = torch.tensor(found or [len(self._seen)])
        mine = torch.nn.functional.pad(mine, (0, 1 + NAMED - len(mine)), value=-1).to(ranks.device)
        first = min(ranks.gather(mine[None]).tolist(), key=lambda share: share[0])
        return [position for position in first[1:] if position >= 0]

    def state(self, ranks: Ranks) -> list[list[float]]:
        """Each rank's sums, for a checkpoint inside a window. All ranks must call it."""
        rows: list[list[float]] = ranks.gather(self._row()[None]).tolist()
        return rows

    def restore(self, rows: list[list[float]], ranks: Ranks, more: float) -> None:
        """The reverse: exact on the same number of ranks; on another one, rank 0 takes all.

        more: micro-batches of a step now, as a multiple of those then; a step weighs what it weighed.
        """
        if len(rows) != ranks.world or more != 1.0:
            none = [0.0] * len(rows[0])
            *scaled, corrupt = [sum(column) for column in zip(*rows, strict=True)]
            rows = [[*(more * total for total in scaled), corrupt]] + [none] * (ranks.world - 1)
        *values, batches, corrupt = rows[ranks.rank]
        self.values = torch.tensor(values, dtype=torch.float64).to(self.values)
        self.batches, self.corrupt = round(batches), round(corrupt)

    def _row(self) -> Tensor:
        return torch.cat([self.values, self.values.new_tensor([self.batches, self.corrupt])]).double()


def usage_counts(job: PhaseJob, ranks: Ranks) -> Tensor:
    """Of the codes seen since the last call, over all ranks: how often each was, float ``[M, K]``."""
    counts = ranks.sum(job.usage.clone())
    job.usage.zero_()
    return counts


def usage_shares(counts: Tensor) -> dict[str, list[float]]:
    """Per codebook, the share of it that was used, the perplexity, and the share of its most frequent code, which is
    what always guessing that code would score; empty where there are no codebooks."""
    if not counts.numel():
        return {}
    return {
        "codebook_usage": code_usage_rate(counts).tolist(),
        "codebook_perplexity": perplexity(counts).tolist(),
        "codebook_majority": (counts.amax(1) / counts.sum(1).clamp(min=1.0)).tolist(),
    }


@torch.no_grad()
def evaluate(
    engine: Any,
    job: PhaseJob,
    heldout: Stream,
    train: TrainSettings,
    data: DataSettings,
    ranks: Ranks,
    stop: StopRequest,
    watchdog: Watchdog,
    deliver: Delivery,
) -> tuple[Means, dict[str, Any]] | None:
    """Means of the phase's metrics, codebook usage and health over held-out clips, the same number on every rank.

    None on all ranks, as if it had not begun, if any was asked to stop meanwhile.
    """
    share = max(1, min(int(heldout.order.samples_per_epoch), train.evaluate_clips) // ranks.world)
    micro = max(size for size in range(1, split_batch(train, ranks.world)[0] + 1) if share % size == 0)
    sums, stopped = Sums(ranks.device), False
    job.usage.zero_()
    job.begin_evaluation()
    engine.eval()
    for batch in heldout.micro_batches(
        start=0, stop=share * ranks.world, batch_size=share * ranks.world, micro_batch_size=micro,
        rank=ranks.rank, world=ranks.world, workers=min(1, data.workers),
    ):  # fmt: skip
        watchdog.at("evaluation")
        vote = ranks.vote(stop.asked)
        inputs = job.inputs(deliver(batch.tensors))
        outputs = engine(*inputs)
        sums.add(outputs[1], batch)
        job.count(outputs[2])
        job.observe(inputs, outputs, batch.positions)
        stopped = vote.passed()
        if stopped:
            break
    engine.train()
    counts = usage_counts(job, ranks)
    return None if stopped else (sums.reduce(ranks)[0], usage_shares(counts) | job.health(ranks))
