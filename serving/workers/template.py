"""What the service's processes are forked from."""

from __future__ import annotations

from bridle.processes.confinement import child_environment
from bridle.processes.template import start_template


def start_workers_template() -> None:
    """Starts it, unless it is there. It never sees the service's secrets, sockets or memory."""
    # Idle threads of a model process must not burn the decoders' time; those that wait for the next operator of a
    # forward pass should spin a moment: asleep, they cost a ViT-S 12 of 74 ms a picture (benchmarks/serving.py).
    spin = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
    start_template("serving.workers.preload", environment=child_environment(**spin))
