"""Labels of the samples of a set of shards, and the stream of labelled clips; runs in the loader's processes too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bridle.config import MaskSettings
from bridle.data.chosen import ChosenOrder
from bridle.data.order import Order
from bridle.data.shards import ShardSet
from bridle.data.stream import OF_ONE_SAMPLE, Stream
from bridle.finetune_recipe import MixupSettings
from bridle.modalities.clip import Modality
from bridle.training.clips import MakeClip

REACH = 256
"""A clip is mixed with one of so many that stand behind it, so that its shard is likely at hand."""


@dataclass(frozen=True)
class Labels:
    """The classes of chosen samples, none twice.

    chosen: numbers of the samples, int64 ``[n]``, rising. starts: int64 ``[n + 1]`` into classes, int32. names: of all
    classes, sorted.
    """

    chosen: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int32]
    names: list[str]

    @classmethod
    def of(cls, samples: Sequence[tuple[int, Sequence[int]]], names: list[str]) -> Labels:
        """From (number, classes) of each sample."""
        counts = [len(classes) for _, classes in samples]
        return cls(
            np.array([number for number, _ in samples], dtype=np.int64),
            np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            np.array([each for _, classes in samples for each in classes], dtype=np.int32),
            names,
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def targets(self, sample: int) -> Tensor:
        """float32 ``[C]``: 1 for each class of a chosen sample."""
        place = int(np.searchsorted(self.chosen, sample))
        found = torch.zeros(len(self.names))
        found[self.classes[self.starts[place] : self.starts[place + 1]].tolist()] = 1.0
        return found

    @property
    def one_each(self) -> bool:
        """Whether every sample has one class."""
        return bool((np.diff(self.starts) == 1).all())

    def weights(self) -> npt.NDArray[np.float64]:
        """float64 ``[n]``: the sum over a sample's classes of one over how often each occurs."""
        rarity = 1.0 / np.maximum(1, np.bincount(self.classes, minlength=len(self.names)))
        return np.add.reduceat(rarity[self.classes], self.starts[:-1])


def order_of(labels: Labels, shards: ShardSet, seed: int, weighted: bool, origin: int = 0) -> Order | None:
    """The order to train in; none where `SampleOrder` will do, which reads neighbours together: all samples alike."""
    if len(labels) == len(shards) and not weighted:
        return None
    return ChosenOrder(
        shards.counts, labels.chosen, seed, weights=labels.weights() if weighted else None, origin=origin
    )


class LabelledStream(Stream):
    """A stream whose samples have ``targets``, float32 ``[C]``; in training they may be mixed.

    Args:
        labels: of the samples that the order gives.
        mixup: see `MixupSettings`; none: clips as they are.
        branches: blocks for whose two branches numbers are drawn, ``branches`` float32 ``[blocks, 2]`` in [0, 1).
    """

    def __init__(
        self,
        shards: ShardSet,
        modality: Modality,
        labels: Labels,
        *,
        mask: MaskSettings | None = None,
        augment: bool = True,
        mixup: MixupSettings | None = None,
        branches: int = 0,
        **order: Any,
    ) -> None:
        super().__init__(shards, MakeClip(modality, mask, augment), **order)
        self.labels, self.mixup, self.branches = labels, mixup or MixupSettings(), branches

    def made(self, sample: int, position: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """As `Stream.made`; what is drawn depends on the generator alone, not on ranks or micro-batches."""
        found = self._labelled(sample, position, rng)
        if self.branches:
            found["branches"] = torch.from_numpy(rng.random((self.branches, 2), dtype=np.float32))
        if self.mixup.share and rng.random() < self.mixup.share:
            found |= self._mixed(found, position, rng)
        return found

    def _labelled(self, sample: int, position: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return super().made(sample, position, rng) | {"targets": self.labels.targets(sample)}

    def _mixed(self, own: dict[str, Tensor], position: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Values and targets mixed with those of a sample that stands a little behind; unmixed if that is corrupt."""
        share = float(rng.beta(self.mixup.alpha, self.mixup.alpha))
        _, partner = self.order.locate(position + 1 + int(rng.integers(REACH)))
        try:
            other = self._labelled(partner, position, rng)
        except OF_ONE_SAMPLE:
            return {}
        mixed = {name: share * own[name] + (1 - share) * other[name] for name in ("values", "targets")}
        return mixed | {"padding": torch.minimum(own["padding"], other["padding"])}
