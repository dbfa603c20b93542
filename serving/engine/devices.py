"""The devices that models run on, found without torch in this process: only its children need it."""

from __future__ import annotations

from contextlib import closing
from functools import cache
from pathlib import Path

from bridle.cores import available_cores
from bridle.processes.child import Child
from serving.settings import ServeSettings

DRIVERS = ("nvidiactl", "nvmap", "dxg", "kfd")
"""In /dev where there may be a GPU: NVIDIA's, a Jetson's, that of Windows' subsystem for Linux, AMD's."""
ASKED_SECONDS = 120.0
MEMORY_BYTES = 1 << 46
"""Address space of the child that asks: CUDA reserves terabytes."""


def devices_of(settings: ServeSettings) -> list[str]:
    """The devices that `device` stands for, each with a number of its own: one may be named twice, for two processes.

    Raises:
        ChildError: where a GPU may be, no child starts that could ask torch.
    """
    names = list(settings.device)
    if settings.device == ("auto",):
        names = [f"cuda:{i}" for i in range(_gpus())] or ["cpu"] * min(2, available_cores())
    return [f"{name}#{i}" for i, name in enumerate(names)]


@cache
def _gpus() -> int:
    if not any(Path("/dev", name).exists() for name in DRIVERS):
        return 0  # torch would say the same, seconds later
    child = Child("serving.workers.gpus:counted", seconds=ASKED_SECONDS, memory_bytes=MEMORY_BYTES)
    with closing(child):
        ((told, _),) = child.answers(b"", {})
    return int(told["gpus"])
