"""A decoder that misbehaves on request; `test_isolation.py` runs it in the child."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridle.modalities.clip import TooLargeError


def answers(data: bytes, request: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    fault = request["fault"]
    if fault == "echo":
        for count in range(request["answers"]):
            yield {"number": count, "pid": os.getpid()}, np.frombuffer(data, np.uint8).reshape(1, -1) + np.uint8(count)
    elif fault == "hang in C without signals":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.CDLL(None).sleep(600)
    elif fault == "hang after one":
        yield {}, np.zeros(3, np.uint8)
        time.sleep(600)
    elif fault == "segfault":
        ctypes.string_at(0)
    elif fault == "abort":
        os.abort()
    elif fault == "memory":
        yield {}, np.ones(8 << 30, np.uint8)
    elif fault == "too large":
        raise TooLargeError("above the limit max_pixels = 5")
    elif fault == "bug":
        raise KeyError("a fault of ours")
    elif fault == "prints":
        os.write(1, b"noise from a library")
        yield {}, np.arange(4, dtype=np.float32)
    elif fault == "writes a file":
        Path(request["path"]).write_bytes(bytes(4096))
    elif fault == "network":
        with socket.socket() as sender:
            code = sender.connect_ex(("127.0.0.1", request["port"]))
        yield {"code": code}, np.zeros(0, np.uint8)
    elif fault == "environment":
        yield {"names": sorted(os.environ)}, np.zeros(0, np.uint8)
    elif fault == "open files":
        yield (
            {"files": sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists())},
            np.zeros(0),
        )
