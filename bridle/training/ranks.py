"""This process among its peers: one process, or many under the deepspeed launcher, torchrun or Kubernetes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bridle.settings import RecipeError

T = TypeVar("T")
REASSURE = 20.0
"""Seconds; shorter than any time that a group waits for a rank."""


@dataclass(frozen=True)
class Ranks:
    """rank of world, and the device of this process."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A gloo group of all ranks beside the one that trains, for what the hosts tell each other."""
    when_well: list[Callable[[], None]] = field(default_factory=list)
    """Called while ranks wait for a long job of rank 0, which says that it is alive; on rank 0 itself, too."""
    local: int = 0
    """Rank among those of this machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def all_reduce(self) -> Callable[[Tensor], Any] | None:
        """Sums a tensor over all ranks in place; none when there is one rank."""
        return dist.all_reduce if self.world > 1 else None

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Equal-shaped tensors of all ranks, joined along the first axis in rank order."""
        if self.world == 1:
            return values
        shares = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(shares, values.contiguous())
        return torch.cat(shares)

    def share(self, values: Tensor) -> None:
        """Overwrites `values` with rank 0's."""
        if self.world > 1:
            dist.broadcast(values, src=0)

    def share_json(self, value: Any) -> Any:
        """Rank 0's `value` on every rank: anything that JSON holds."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, src=0, group=self.control)
        data = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(int(size), dtype=torch.uint8)
        )
        dist.broadcast(data, src=0, group=self.control)
        return json.loads(data.numpy().tobytes())

    def on_first(self, job: Callable[[], T]) -> T:
        """Runs `job` on rank 0 and gives what it returns, which JSON must hold, to every rank.

        Raises:
            RecipeError: on all ranks, where rank 0's job raised one.
            OSError: on the others, where it raised anything else, which rank 0 itself raises: none waits for ever.
        """
        if self.world == 1:
            with self._reassured():
                return job()
        result, failure = None, None
        with self._reassured():
            if self.first:
                try:
                    result = job()
                except Exception as error:
                    failure = error
        said = None if failure is None else [isinstance(failure, RecipeError), str(failure)]
        said, result = self.share_json([said, result])
        if failure is not None:
            raise failure
        if said is not None:
            raise RecipeError(said[1]) if said[0] else OSError("rank 0 could not go on; its message says why")
        return cast("T", result)

    @contextlib.contextmanager
    def _reassured(self) -> Iterator[None]:
        """Others wait until rank 0 leaves the context, however long: it says every `REASSURE` seconds that it lives."""
        done = threading.Event()

        def say(ended: bool) -> bool:
            if self.world == 1:
                return ended
            word = torch.tensor([float(ended)])
            dist.broadcast(word, src=0, group=self.control)
            return bool(word.item())

        def reassure() -> None:
            while not done.wait(REASSURE):
                say(False)
                self._is_well()

        speaker = threading.Thread(target=reassure, name="bridle-reassure", daemon=True)
        if self.first:
            speaker.start()
        try:
            yield
        finally:
            if self.first:
                done.set()
                speaker.join()
        while not say(True):
            self._is_well()

    def _is_well(self) -> None:
        for hear in self.when_well:
            hear()

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()

    def vote(self, yes: bool) -> Vote:
        """Begins to ask all ranks whether any says yes. All must ask alike; no device waits for it."""
        ballot = torch.tensor([float(yes)])
        work = dist.all_reduce(ballot, group=self.control, async_op=True) if self.world > 1 else None
        return Vote(ballot, work)


@dataclass(frozen=True)
class Vote:
    """A question to all ranks that is on its way while they compute."""

    ballot: Tensor
    work: dist.Work | None

    def passed(self) -> bool:
        """Whether any rank said yes; waits for the slowest rank to ask."""
        if self.work is not None:
            self.work.wait()
        return bool(self.ballot.item())


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    words = ("gloo", "NCCL", "Connection closed by peer", "TCPStore")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
