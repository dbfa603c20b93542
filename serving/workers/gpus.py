"""How many GPUs there are, told by a child: the service itself does without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def counted(data: bytes, request: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """In the child: one answer, ``{"gpus": n}``."""
    yield {"gpus": torch.cuda.device_count()}, np.zeros(0)
