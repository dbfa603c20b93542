"""Sees where a program waits for a device, or copies between it and the host."""

from __future__ import annotations

import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Crossings(TorchDispatchMode):
    """Counts operations that wait for a device, or have tensors of two (or of the host) at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if "cpu" in devices or "_local_scalar_dense" in str(func):
            lines = [frame for frame in traceback.extract_stack() if "/bridle/" in frame.filename]
            self.found[f"{func} at {lines[-1].filename}:{lines[-1].lineno}" if lines else str(func)] += 1
        return out
