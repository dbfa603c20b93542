"""A classifier's scores of held-out files, by all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bridle.classifier import Classifier
from bridle.data.errors import ShardError
from bridle.data.handover import packed, unpacked
from bridle.data.loaders import made_by_workers
from bridle.data.shards import ShardSet
from bridle.evaluation.classification import views
from bridle.finetune_recipe import ViewSettings
from bridle.modalities.clip import ClipError, Modality
from bridle.training.ranks import Ranks

log = logging.getLogger("bridle")
ROUND = 512
"""Clips that a rank looks at between two looks at whether the run was asked to stop, about."""
BATCH = 16


class FileViews(torch.utils.data.IterableDataset[tuple[int, Any, int]]):
    """The clips of files to be scored: (place in `numbers`, values ``[C, *S]``, positions of content), or (place, why
    the file cannot be read, -1). Loader processes share the files out."""

    def __init__(self, shards: ShardSet, modality: Modality, numbers: Sequence[int], wanted: ViewSettings) -> None:
        self.shards, self.modality, self.numbers, self.wanted = shards, modality, numbers, wanted

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for place in range(first, len(self.numbers), step):
            number = self.numbers[place]
            try:
                for clip in views(self.modality, self.shards.data(number), self.wanted.clips, self.wanted.crops):
                    yield place, packed(clip.values), clip.positions
            except (ClipError, ShardError) as error:
                shard, key = self.shards.where(number)
                yield place, f"{shard}, key {key}: {' '.join(str(error).split())}", -1


def score_files(
    classifier: Classifier,
    shards: ShardSet,
    numbers: Sequence[int],
    wanted: ViewSettings,
    ranks: Ranks,
    look: Callable[[str], None],
    workers: int = 0,
) -> Tensor:
    """float64 ``[n, classes]`` on the CPU: the mean over each file's clips of their probabilities, by content; a row of
    nan is a file that cannot be read. All ranks must call it, and get the same.

    look: called with a place by all ranks at once, every `ROUND` clips or so; it may raise to stop them all.
    """
    per_rank = -(-len(numbers) // ranks.world)
    own = list(numbers[ranks.rank :: ranks.world])
    sums = torch.zeros(per_rank, len(classifier.config.classes) + 1, dtype=torch.float64, device=ranks.device)
    size = max(1, ROUND // (wanted.clips * wanted.crops))
    for begin in range(0, per_rank, size):
        look(f"scoring held-out files, from {begin * ranks.world}")
        part = own[begin : begin + size]
        if part:
            _add(classifier, FileViews(shards, classifier.modality, part, wanted), sums[begin:], min(workers, 4))
    everyone = ranks.gather(sums).view(ranks.world, per_rank, -1).transpose(0, 1).flatten(0, 1)[: len(numbers)].cpu()
    return everyone[:, :-1] / everyone[:, -1:].where(everyone[:, -1:] > 0, torch.nan)


def _add(classifier: Classifier, files: FileViews, sums: Tensor, workers: int) -> None:
    """Adds probabilities times content, and content, to each file's row; an unreadable file's row stays 0."""
    batch: list[tuple[int, Tensor, int]] = []
    failed: set[int] = set()

    def flush() -> None:
        values, content = torch.stack([value for _, value, _ in batch]), [count for *_, count in batch]
        found = classifier.probabilities(values, content).double()
        for (place, _, count), row in zip(batch, found, strict=True):
            sums[place] += count * torch.cat([row, row.new_ones(1)])
        batch.clear()

    for place, found, count in made_by_workers(files, workers):
        if count < 0:
            log.warning("a held-out file cannot be read and is left out: %s", found)
            failed.add(place)
            continue
        batch.append((place, unpacked(found) if not isinstance(found, Tensor) else found, count))
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    for place in failed:
        sums[place] = 0
