"""Tensors of a file that rank 0 alone can read, handed to all ranks over the group, one tensor after another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bridle.training.manifest import CheckpointError
from bridle.training.ranks import Ranks


class SharedTensors:
    """A safetensors file on rank 0's disk. All ranks make one, and call it in the same order with the same arguments.

    Raises:
        CheckpointError (OSError on the other ranks): it cannot be read, or does not hold exactly what is expected.
    """

    def __init__(self, path: Path, shapes: Mapping[str, torch.Size], ranks: Ranks, exactly: bool = True) -> None:
        """shapes: of every tensor that must be there, by name; exactly: whether others must not be there."""
        self.path, self.ranks = path, ranks
        self._file: Any = None
        ranks.on_first(lambda: self._open(shapes, exactly))

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """One tensor, on this rank's device, equal on every rank."""
        if self._file is not None:
            value = self._file.get_tensor(name).to(self.ranks.device, dtype).contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=self.ranks.device)
        self.ranks.share(value)
        return value

    def _open(self, shapes: Mapping[str, torch.Size], exactly: bool) -> None:
        try:
            file = safe_open(self.path, "pt")
            names = [name for name in file.keys() if exactly or name in shapes]  # noqa: SIM118
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from None
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        if found != wanted:
            name = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            raise CheckpointError(
                f"{self.path}: does not fit this recipe's model: {name} is {_said(found.get(name))} there,"
                f" {_said(wanted.get(name))} here"
            )
        self._file = file


def fill(module: nn.Module, path: Path, ranks: Ranks) -> None:
    """Fills a module strictly, on all ranks, from rank 0's file.

    Raises:
        CheckpointError (OSError on the other ranks): missing, superfluous or misshapen weights.
    """
    state = module.state_dict()
    tensors = SharedTensors(path, {name: value.shape for name, value in state.items()}, ranks)
    for name, value in state.items():
        value.copy_(tensors.read(name, value.shape, value.dtype))


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"{list(shape)}"
