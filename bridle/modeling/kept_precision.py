"""State that no cast may touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class KeptPrecision(nn.Module):
    """A module whose buffers keep their dtype: figures that grow by small steps, and stop where bfloat16 does (a count
    of 256 and one more is 256)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves devices as told; casts nothing."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own has no types
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
