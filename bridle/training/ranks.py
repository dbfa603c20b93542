"""This process among its peers: one process, or many under the deepspeed launcher, torchrun or Kubernetes."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bridle.settings import RecipeError

T = TypeVar("T")
REASSURE = 20.0
"""Seconds; shorter than any time that a group waits for a rank."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""With nccl a lost peer is only noticed by this; long enough for rank 0 to write a checkpoint meanwhile."""


@dataclass(frozen=True)
class Ranks:
    """rank of world, and the device of this process."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A gloo group of all ranks beside the one that trains, for what the hosts tell each other."""

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
            word = torch.tensor([float(ended)])
            dist.broadcast(word, src=0, group=self.control)
            return bool(word.item())

        def reassure() -> None:
            while not done.wait(REASSURE):
                say(False)

        speaker = threading.Thread(target=reassure, name="bridle-reassure", daemon=True)
        if self.first:
            speaker.start()
        yield
        if self.first:
            done.set()
            speaker.join()
        while not say(True):
            pass

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


def join() -> Ranks:
    """Joins the process group that the environment describes (none: a group of one)."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # The shared-memory op is compiled on first use, for a minute, with a compiler that may not be there; gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ["LOCAL_RANK"])
    accelerator.set_device(local)
    try:
        deepspeed.init_distributed(
            accelerator.communication_backend_name(),
            auto_mpi_discovery=False,
            timeout=COLLECTIVE_TIMEOUT,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(
            f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}); if another job on this machine uses that"
            " port, give one with deepspeed --master_port PORT"
        ) from None
    device = torch.device(accelerator.device_name(local) if accelerator.device_name() != "cpu" else "cpu")
    control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(control, dist.ProcessGroup)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, control)


def leave() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
