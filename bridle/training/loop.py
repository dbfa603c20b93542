"""The training loop: one for all phases."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from bridle.config import DataSettings, TrainedPhase, TrainSettings
from bridle.data.stream import MicroBatch, Stream
from bridle.errors import MistakeError
from bridle.evaluation.health import verdict
from bridle.training.checkpoints import PhaseCheckpoints, Position
from bridle.training.clips import Delivered, Delivery
from bridle.training.engine import learning_rate, set_learning_rate, split_batch
from bridle.training.keeper import Keeper
from bridle.training.measures import Sums, evaluate, usage_counts, usage_shares
from bridle.training.metrics import RunLog, progress_line
from bridle.training.phases import Means, PhaseJob
from bridle.training.ranks import Ranks
from bridle.training.speed import Rate, StepTimes
from bridle.training.stopping import StoppedError, StopRequest
from bridle.training.watchdog import Watchdog

log = logging.getLogger("bridle")


class NonFiniteLossError(MistakeError):
    """The loss stopped being a number; the last checkpoint is from before."""


class CorruptDataError(MistakeError):
    """More samples than allowed could not be read."""


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


@dataclass(kw_only=True)
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
    keeper: Keeper
    run_log: RunLog | None
    stop: StopRequest
    watchdog: Watchdog
    where: str
    """The run folder, for messages."""
    rate: Rate
    deliver: Delivery

    def run(self, position: Position) -> Position:
        """Trains from `position` to the end of the phase.

        Raises:
            StoppedError, NonFiniteLossError, CorruptDataError, OSError: on all ranks alike.
        """
        sums = self._restored_sums(position)
        if position.evaluation_due:
            self._evaluate(position, sums)
        times = StepTimes(self.ranks)
        batches = Delivered(self.batches(position), self.deliver)
        self.engine.train()
        while position.step < self.length.total:
            vote = self.ranks.vote(self.stop.asked)
            lr = self.step(position.step, batches, times, sums)
            position.step += 1
            position.samples += self.train.batch_size
            self.watchdog.at(f"{self._name} the end of step {position.step}")
            stop = vote.passed()
            if self.run_log is not None:
                self.run_log.prometheus.stepped.set_to_current_time()
            if self._is_boundary(position.step):
                self._boundary(position, times, sums, lr, stop)
            if stop:
                self._save_and_stop(position, sums)
        return position

    def _restored_sums(self, position: Position) -> Sums:
        """Sums of steps that a checkpoint interrupted, or new ones."""
        sums = Sums(self.ranks.device)
        if position.window is not None:
            sums.restore(position.window["sums"], self.ranks, self._micro_batches / position.window["micro_batches"])
            if self.ranks.first:
                self.job.usage.copy_(torch.tensor(position.window["usage"]).reshape(self.job.usage.shape))
            position.window = None
        return sums

    @property
    def _micro_batches(self) -> int:
        """Of a step, over all ranks."""
        return self.ranks.world * split_batch(self.train, self.ranks.world)[1]

    def batches(self, position: Position) -> Iterator[MicroBatch]:
        """This rank's micro-batches from `position` to the end of the phase."""
        micro, _ = split_batch(self.train, self.ranks.world)
        return self.stream.micro_batches(
            start=position.samples,
            stop=position.samples + (self.length.total - position.step) * self.train.batch_size,
            batch_size=self.train.batch_size,
            micro_batch_size=micro,
            rank=self.ranks.rank,
            world=self.ranks.world,
            workers=self.data.workers,
        )

    def step(self, number: int, batches: Delivered, times: StepTimes, sums: Sums) -> float:
        """Optimizer step `number`, counted from 0, over the next micro-batches; returns its learning rate."""
        lr = learning_rate(self.settings.lr, number, self.length.warmup, self.length.total)
        self.job.begin_step(number)
        set_learning_rate(self.engine, lr, self.job.slow_step)
        _, accumulation = split_batch(self.train, self.ranks.world)
        for _ in range(accumulation):
            self.watchdog.at(f"{self._name} waiting for clips")
            times.parts.begin("data_wait")
            batch, tensors = next(batches)
            self.watchdog.at(f"{self._name} forward and backward")
            times.parts.begin("forward")
            loss, metrics, codes, *_ = self.engine(*self.job.inputs(tensors))
            times.parts.begin("backward")
            self.engine.backward(loss)
            # Before the optimizer's step, in which the host waits for the device: the device is busy until then.
            self.watchdog.at(f"{self._name} waiting for clips")
            times.parts.begin("data_wait")
            batches.fetch()
            self.watchdog.at(f"{self._name} the optimizer's step")
            times.parts.begin("optimizer")
            self.engine.step()
            times.parts.begin("codebooks")
            sums.add(metrics, batch)
            self.job.count(codes)
        self.job.after_step(self.ranks.all_reduce)
        times.parts.begin("")
        times.steps += 1
        return lr

    def _is_boundary(self, step: int) -> bool:
        """Rows are written and the device is waited for only here; regular checkpoints are always at one."""
        return (
            any(
                every and step % every == 0
                for every in (self.train.log_every, self.train.checkpoint_every, self.train.evaluate_every)
            )
            or step == self.length.total
        )

    def _boundary(self, position: Position, times: StepTimes, sums: Sums, lr: float, stop: bool) -> None:
        means, corrupt = sums.reduce(self.ranks)
        usage = usage_shares(usage_counts(self.job, self.ranks))
        rates = times.rates(self.train.batch_size, self.rate)
        position.corrupt += corrupt
        position.seconds += rates["step_seconds"] * times.steps
        self._refuse_non_finite(position, means, sums)
        if self.run_log is not None:
            row = self._row(position, "train", means, usage) | {
                "lr": lr, "gradient_norm": _gradient_norm(self.engine), **rates, "corrupt": position.corrupt
            }  # fmt: skip
            self.run_log.write(row)
            self.run_log.prometheus.observe(row, times.steps, times.steps * self.train.batch_size, corrupt)
            left = (self.length.total - position.step) * rates["step_seconds"]
            log.info(progress_line(row, self._name, self.length.total, left))
        self._check_corrupt(position)
        sums.reset()
        position.evaluation_due = self._is_evaluated(position.step)
        if not stop:
            if position.evaluation_due:
                self._evaluate(position, sums)
            if position.step != self.length.total and position.step % self.train.checkpoint_every == 0:
                self._checkpoint(position)
        times.reset()

    def _save_and_stop(self, position: Position, sums: Sums) -> NoReturn:
        """Saves what lies between two rows too, so that the row that comes next is the one that would have come."""
        if sums.batches:
            self._refuse_non_finite(position, sums.reduce(self.ranks)[0], sums)
            counts = usage_counts(self.job, self.ranks)
            state = {"sums": sums.state(self.ranks), "micro_batches": self._micro_batches}
            position.window = state | {"usage": counts.tolist()}
        self._checkpoint(position)
        self.keeper.settle()
        raise StoppedError

    def _refuse_non_finite(self, position: Position, means: Means, sums: Sums) -> None:
        """No checkpoint is written of weights whose loss is no number."""
        if not np.isfinite(np.hstack(list(means.values()))).all():
            clips = sums.first_not_finite(self.ranks)
            raise NonFiniteLossError(self.ranks.on_first(lambda: self._non_finite_message(position, clips)))

    @property
    def _name(self) -> str:
        return f"[{self.index} {self.job.kind}]"

    def _row(self, position: Position, split: str, means: Means, usage: dict[str, Any]) -> dict[str, Any]:
        about = {
            "phase": self.job.kind, "phase_index": self.index, "split": split,
            "step": position.step, "total_steps": self.length.total, "samples": position.samples,
        }  # fmt: skip
        return about | self.job.settle(means) | usage

    def _checkpoint(self, position: Position) -> None:
        self.watchdog.at(f"{self._name} writing a checkpoint")
        began = time.perf_counter()
        self.checkpoints.save(self.engine, position, self.keeper)
        if self.run_log is not None:
            self.run_log.prometheus.checkpoint_stall.set(time.perf_counter() - began)

    def _is_evaluated(self, step: int) -> bool:
        every = self.train.evaluate_every
        return self.heldout is not None and (step == self.length.total or (every > 0 and step % every == 0))

    def _evaluate(self, position: Position, sums: Sums) -> None:
        """Between two windows: uses the job's counts of codes."""
        assert self.heldout is not None
        found = evaluate(
            self.engine,
            self.job,
            self.heldout,
            self.train,
            self.data,
            self.ranks,
            self.stop,
            self.watchdog,
            self.deliver,
        )
        if found is None:
            self._save_and_stop(position, sums)
        position.evaluation_due = False
        if self.run_log is not None:
            row = self._row(position, "heldout", *found)
            judged = verdict(row) if position.step == self.length.total else None
            if judged is not None:
                row |= {"healthy": judged[0], "verdict": judged[1]}
            self.run_log.write(row)
            log.info(progress_line(row, self._name, self.length.total, 0.0))
            if judged is not None:
                log.log(logging.INFO if judged[0] else logging.WARNING, "%s %s", self._name, judged[1])

    def _check_corrupt(self, position: Position) -> None:
        allowed = self.data.max_corrupt * position.samples
        if position.corrupt > (max(1.0, allowed) if allowed else 0.0):
            raise CorruptDataError(
                f"{position.corrupt} of {position.samples} samples could not be read, more than data.max_corrupt ="
                f" {self.data.max_corrupt}; see the warnings above, run `bridle shards check`, or raise that share"
            )

    def _non_finite_message(self, position: Position, clips: list[int]) -> str:
        keys = [self.stream.shards.where(self.stream.order.locate(clip)[1]) for clip in clips]
        named = ", ".join(f"{key} of {shard}" for shard, key in keys)
        self.keeper.ready()
        steps = self.checkpoints.steps()
        good = f"{self.index}:{int(steps[-1].name.removeprefix('step-'))}" if steps else f"{self.index - 1}"
        return (
            f"the loss is not finite at step {position.step} of phase {self.index} ({self.job.kind}), first in the"
            f" batch that begins with {named or 'a clip that is not known any more'}. Look at these clips, or begin"
            f" another run from before it broke with a lower rate or a longer warm-up: --run OTHER"
            f" --from {self.where}:{good} phases.{self.index}.lr=..."
        )


def _gradient_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0
