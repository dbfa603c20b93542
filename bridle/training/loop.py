"""The training loop: one for all phases."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridle.config import DataSettings, TrainedPhase, TrainSettings
from bridle.data.stream import MicroBatch, Stream
from bridle.training.checkpoints import PhaseCheckpoints, Position
from bridle.training.engine import learning_rate, set_learning_rate, split_batch
from bridle.training.metrics import RunLog, Window, progress_line
from bridle.training.phases import PhaseJob
from bridle.training.ranks import Ranks

log = logging.getLogger("bridle")


class StoppedBySignalError(Exception):
    """SIGTERM or SIGINT arrived; a checkpoint was written."""


class NonFiniteLossError(ValueError):
    """The loss stopped being a number; the last checkpoint is from before."""


class CorruptDataError(ValueError):
    """More samples than allowed could not be read."""


class StopFlag:
    """Set by SIGTERM and SIGINT, looked at between steps."""

    def __init__(self) -> None:
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.set = True


@dataclass(frozen=True)
class Length:
    """A phase in optimizer steps."""

    total: int
    warmup: int

    @classmethod
    def of(cls, phase: TrainedPhase, samples: float, batch_size: int) -> Length:
        """From epochs of `samples` clips (the mean, where sources are mixed), or from steps as given."""
        if phase.steps is not None:
            total = phase.steps
        else:
            assert phase.epochs is not None
            total = max(1, math.ceil(phase.epochs * samples / batch_size))
        warmup = phase.warmup_steps or 0
        if phase.warmup_epochs is not None:
            warmup = math.ceil(phase.warmup_epochs * samples / batch_size)
        return cls(total, min(warmup, total))


@dataclass
class PhaseRun:
    """Everything one phase's loop needs."""

    index: int
    settings: TrainedPhase
    job: PhaseJob
    engine: Any
    stream: Stream
    heldout: Stream | None
    length: Length
    train: TrainSettings
    data: DataSettings
    ranks: Ranks
    checkpoints: PhaseCheckpoints
    run_log: RunLog | None
    stop: StopFlag

    def run(self, position: Position) -> Position:
        """Trains from `position` to the end of the phase.

        Raises:
            StoppedBySignalError, NonFiniteLossError, CorruptDataError, OSError: on all ranks alike.
        """
        window, sums = Window(), _Sums(len(self.job.metric_names), self.ranks.device)
        batches = self._batches(position)
        while position.step < self.length.total:
            lr = learning_rate(self.settings.lr, position.step, self.length.warmup, self.length.total)
            set_learning_rate(self.engine, lr)
            self._step(batches, window, sums)
            position.step += 1
            position.samples += self.train.batch_size
            if self._is_boundary(position.step):
                self._boundary(position, window, sums, lr)
        return position

    def _batches(self, position: Position) -> Iterator[MicroBatch]:
        micro, _ = split_batch(self.train, self.ranks.world)
        return self.stream.micro_batches(
            start=position.samples,
            stop=self.length.total * self.train.batch_size,
            batch_size=self.train.batch_size,
            micro_batch_size=micro,
            rank=self.ranks.rank,
            world=self.ranks.world,
            workers=self.data.workers,
        )

    def _step(self, batches: Iterator[MicroBatch], window: Window, sums: _Sums) -> None:
        _, accumulation = split_batch(self.train, self.ranks.world)
        self.engine.train()
        for _ in range(accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - asked
            loss, metrics, codes = self.engine(*self.job.inputs(to_device(batch.tensors, self.ranks.device)))
            self.engine.backward(loss)
            self.engine.step()
            sums.add(metrics, batch)
            self.job.count(codes)
        self.job.after_step(self.ranks.all_reduce)
        window.steps += 1

    def _is_boundary(self, step: int) -> bool:
        """Rows are written and peers heard only here; a checkpoint is always at one, so that rows restart exactly."""
        return (
            any(
                every and step % every == 0
                for every in (self.train.log_every, self.train.checkpoint_every, self.train.evaluate_every)
            )
            or step == self.length.total
        )

    def _boundary(self, position: Position, window: Window, sums: _Sums, lr: float) -> None:
        means, corrupt, stop = sums.reduce(self.ranks, self.stop.set)
        usage = _usage(self.job, self.ranks)
        rates = window.rates(self.train.batch_size)
        position.corrupt += corrupt
        position.seconds += rates["step_seconds"] * window.steps
        if not all(math.isfinite(value) for value in means):
            raise NonFiniteLossError(self._non_finite_message(position))
        if self.run_log is not None:
            row = self._row(position, "train", means, usage) | {
                "lr": lr, "gradient_norm": _gradient_norm(self.engine), **rates, "corrupt": position.corrupt
            }  # fmt: skip
            self.run_log.write(row)
            self.run_log.prometheus.observe(row, window.steps, window.steps * self.train.batch_size, corrupt)
            left = (self.length.total - position.step) * rates["step_seconds"]
            log.info(progress_line(row, self._name, self.length.total, left))
        self._check_corrupt(position)
        self._evaluate_if_due(position.step, position)
        last = position.step == self.length.total
        if stop or (not last and position.step % self.train.checkpoint_every == 0):
            self._checkpoint(position)
        if stop:
            raise StoppedBySignalError
        sums.reset()
        window.reset()

    @property
    def _name(self) -> str:
        return f"[{self.index} {self.job.kind}]"

    def _row(self, position: Position, split: str, means: list[float], usage: dict[str, list[float]]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "phase": self.job.kind, "phase_index": self.index, "split": split,
            "step": position.step, "samples": position.samples,
        }  # fmt: skip
        for name, value in zip(self.job.metric_names, means, strict=True):
            base, _, which = name.rpartition("_")
            if which.isdigit():
                key = {"loss_codebook": "loss_per_codebook", "accuracy_codebook": "accuracy", "error_stage": "error"}[
                    base
                ]
                row.setdefault(key, []).append(value)
            else:
                row[name] = value
        return row | usage

    def _checkpoint(self, position: Position) -> None:
        began = time.perf_counter()
        folder = self.checkpoints.save(self.engine, position, self.ranks)
        if self.run_log is not None:
            took = time.perf_counter() - began
            self.run_log.prometheus.checkpoint.set(took)
            log.info("%s checkpoint %s in %.1f s", self._name, folder.name, took)

    def _evaluate_if_due(self, step: int, position: Position) -> None:
        every = self.train.evaluate_every
        if self.heldout is None or not (step == self.length.total or (every and step % every == 0)):
            return
        means, usage = evaluate(self.engine, self.job, self.heldout, self.train, self.data, self.ranks)
        if self.run_log is not None:
            row = self._row(position, "heldout", means, usage)
            self.run_log.write(row)
            log.info(progress_line(row, self._name, self.length.total, 0.0))

    def _check_corrupt(self, position: Position) -> None:
        allowed = self.data.max_corrupt * position.samples
        if position.corrupt > max(1.0, allowed):
            raise CorruptDataError(
                f"{position.corrupt} of {position.samples} samples could not be read, more than data.max_corrupt ="
                f" {self.data.max_corrupt}; see the warnings above, run `bridle shards check`, or raise that share"
            )

    def _non_finite_message(self, position: Position) -> str:
        last = self.checkpoints.steps()
        where = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint in this phase yet"
        return (
            f"the loss is not finite at step {position.step} of phase {self.index} ({self.job.kind}); {where};"
            " lower the phase's lr or lengthen its warm-up, and start again"
        )


@torch.no_grad()
def evaluate(
    engine: Any, job: PhaseJob, heldout: Stream, train: TrainSettings, data: DataSettings, ranks: Ranks
) -> tuple[list[float], dict[str, list[float]]]:
    """Means of the phase's metrics and codebook usage over held-out clips, the same number on every rank."""
    share = max(1, min(len(heldout.shards), train.evaluate_clips) // ranks.world)
    micro = max(size for size in range(1, split_batch(train, ranks.world)[0] + 1) if share % size == 0)
    sums = _Sums(len(job.metric_names), ranks.device)
    job.usage.zero_()
    engine.eval()
    for batch in heldout.micro_batches(
        start=0, stop=share * ranks.world, batch_size=share * ranks.world, micro_batch_size=micro,
        rank=ranks.rank, world=ranks.world, workers=min(1, data.workers),
    ):  # fmt: skip
        _, metrics, codes = engine(*job.inputs(to_device(batch.tensors, ranks.device)))
        sums.add(metrics, batch)
        job.count(codes)
    engine.train()
    return sums.reduce(ranks, False)[0], _usage(job, ranks)


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves a batch."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


class _Sums:
    """Sums of metrics on the device; the host looks at them only when a row is due."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, device=device)
        self.batches = 0
        self.corrupt = 0

    def add(self, metrics: Tensor, batch: MicroBatch) -> None:
        self.values += metrics
        self.batches += 1
        for sample in batch.corrupt:
            log.warning("corrupt sample replaced: %s, key %s: %s", sample.shard, sample.key, sample.error)
        self.corrupt += len(batch.corrupt)

    def reduce(self, ranks: Ranks, stop: bool) -> tuple[list[float], int, bool]:
        """Means over all ranks, corrupt samples of all ranks, and whether any rank was asked to stop."""
        extra = self.values.new_tensor([self.batches, self.corrupt, stop])
        *totals, batches, corrupt, stops = ranks.sum(torch.cat([self.values, extra]).double()).tolist()
        return [total / batches for total in totals], int(corrupt), stops > 0

    def reset(self) -> None:
        self.values.zero_()
        self.batches = self.corrupt = 0


def _usage(job: PhaseJob, ranks: Ranks) -> dict[str, list[float]]:
    """Of the codes seen since the last call, over all ranks, per codebook: the share of the codebook that was used, and
    the share of its most frequent code, which is what always guessing that code would score."""
    counts = ranks.sum(job.usage.clone())
    job.usage.zero_()
    return {
        "codebook_usage": (counts > 0).float().mean(1).tolist(),
        "codebook_majority": (counts.amax(1) / counts.sum(1).clamp(min=1.0)).tolist(),
    }


def _gradient_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0
