"""From a loader process to its parent: large tensors in shared memory where it has room, the rest through the pipe."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

log = logging.getLogger(__name__)
SHARED = "/dev/shm"
SMALL = 1 << 16
"""Bytes of a tensor that is not worth shared memory, which takes a handshake (0.3 ms)."""
LEFT = 4
"""One part in so many of shared memory stays free: nccl keeps its buffers there, and dies where it cannot."""


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[n, ...]`` of n equal tensors; in a loader process made in shared memory at once, if there is room."""
    size = len(tensors) * tensors[0].nbytes
    if get_worker_info() is None or size <= SMALL or not _has_room(size):
        return torch.stack(tuple(tensors))
    try:
        shared: torch.Tensor = default_collate(list(tensors))
    except RuntimeError:  # another process took the room; a fault of the tensors is raised again
        return torch.stack(tuple(tensors))
    return shared


def packed(tensor: torch.Tensor) -> Any:
    """What to pickle for `tensor`: itself where it is large and shared, else its bytes, which need no shared memory."""
    if tensor.nbytes > SMALL and tensor.is_shared():
        return tensor
    if tensor.dtype == torch.bfloat16:  # numpy has no such thing
        return "bfloat16", tensor.view(torch.int16).numpy()
    return tensor.numpy()


def unpacked(found: Any) -> torch.Tensor:
    """The inverse of `packed`."""
    if isinstance(found, tuple):
        return torch.as_tensor(found[1]).view(torch.bfloat16)
    return torch.as_tensor(found)


def bytes_for_the_pipe(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of those that are large, and for which a loader process found no shared memory."""
    if get_worker_info() is None:
        return 0
    return sum(tensor.nbytes for tensor in tensors if tensor.nbytes > SMALL and not tensor.is_shared())


@functools.cache
def warn_of_little_memory() -> None:
    """Says once what is slow, and what to do; on the first rank of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        about = os.statvfs(SHARED)
        log.warning(
            "%s (%.0f MiB) has no room for all batches: some go through pipes, which is slower. Give it ranks x "
            "data.workers x 3 micro-batches, and a third more (docker: --shm-size=2g; Kubernetes: emptyDir in memory)",
            SHARED,
            about.f_blocks * about.f_frsize / (1 << 20),
        )


def _has_room(size: int) -> bool:
    try:
        about = os.statvfs(SHARED)
    except OSError:  # not this system's way
        return True
    return about.f_bavail * about.f_frsize - size >= about.f_blocks * about.f_frsize // LEFT
