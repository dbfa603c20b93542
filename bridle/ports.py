"""A port at which processes of this machine meet."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that systems give to whoever asks for any."""


def free_port() -> int:
    """A port of this machine for ranks to meet at, which nobody listens on now: they do only seconds later.

    Raises:
        OSError: none of a hundred is free.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free port among a hundred from {PORTS.start} to {PORTS.stop}; end what listens there")
