"""What a phase takes from its first batches before it trains: the codebooks' start and the scale of the target.

Both are the same on every rank and do not depend on how a batch is split over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bridle.config import Recipe
from bridle.data.stream import MicroBatch, Stream
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import content_mask
from bridle.modeling.target import TargetScale, target_sums
from bridle.modeling.tokenizer import Tokenizer
from bridle.training.auto_clip import warn_of_other_statistics
from bridle.training.clips import Delivery, raw_modality
from bridle.training.engine import split_batch
from bridle.training.ranks import Ranks

INITIAL_LATENTS = 65_536
"""Latents that codebooks are initialised from, at most: enough for k-means, small enough to gather."""
TARGET_BATCHES = 8
"""Batches that the mean and deviation of the target are taken over."""


def initialise_codebooks(
    tokenizer: Tokenizer,
    stream: Stream,
    recipe: Recipe,
    ranks: Ranks,
    seed: int,
    look: Callable[[], None],
    deviation: float,
) -> None:
    """Codebooks from the content of the first batch of all ranks, in the order of positions, solved once, shared.

    look: called between batches; deviation: of values that the recipe's mean and std fit, else there is a warning.
    """
    tokenizer.to(ranks.device).eval()
    latents: list[Tensor] = []
    kept: list[Tensor] = []
    positions: list[int] = []
    deliver = Delivery(raw_modality(recipe), ranks.device)
    for batch in _batches(stream, recipe, ranks, 1):
        look()
        tensors = deliver(batch.tensors)
        with torch.no_grad():
            found = tokenizer.latents(tensors["values"], _valid(tensors, tokenizer.patch.count)).float()
        count = found.shape[1]
        if ranks.first and not latents:
            valid = count - batch.tensors["padding"]
            warn_of_other_statistics(
                tokenizer.patch.cut(tensors["values"].cpu()), content_mask(valid, count), deviation
            )
        valid = count - batch.tensors["padding"].to(ranks.device)
        chosen, distinct = spread(valid, count, INITIAL_LATENTS // recipe.train.batch_size)
        latents.append(torch.gather(found, 1, chosen.unsqueeze(-1).expand(-1, -1, found.shape[-1])))
        kept.append(distinct)
        positions += batch.positions
    order = ranks.gather(torch.tensor(positions, device=ranks.device)).argsort()
    everyone = ranks.gather(torch.cat(latents))[order]
    distinct = ranks.gather(torch.cat(kept).to(torch.uint8))[order].bool()
    if ranks.first:
        tokenizer.quantizer.initialize(everyone[distinct], torch.Generator(device=ranks.device).manual_seed(seed))
    for buffer in tokenizer.quantizer.buffers():
        ranks.share(buffer)


def fit_target(
    scale: TargetScale,
    teacher: Encoder,
    stream: Stream,
    recipe: Recipe,
    ranks: Ranks,
    bf16: bool,
    look: Callable[[], None],
) -> None:
    """Mean and deviation of the teacher's embeddings over the content of the first batches of all ranks.

    look: called between batches.
    """
    teacher.to(ranks.device).eval()
    scale.to(ranks.device)
    sums = torch.zeros(1 + 2 * teacher.width, dtype=torch.float64, device=ranks.device)
    deliver = Delivery(raw_modality(recipe), ranks.device)
    for batch in _batches(stream, recipe, ranks, TARGET_BATCHES):
        look()
        tensors = deliver(batch.tensors)
        valid = _valid(tensors, teacher.patch.count)
        with torch.no_grad(), torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
            embeddings = teacher.embeddings(tensors["values"], valid)
        sums += target_sums(embeddings, None if valid is None else content_mask(valid, embeddings.shape[1]))
    scale.fit(ranks.sum(sums))


def spread(valid: Tensor, total: int, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` evenly spaced positions of each clip's content.

    valid: int64 ``[b]`` of `total` positions. Returns int64 ``[b, n]``, and bool ``[b, n]`` that is false where a short
    clip's position comes again.
    """
    steps = torch.linspace(0, 1, min(total, max(1, count)), dtype=torch.float64, device=valid.device)
    chosen = (steps * (valid[:, None] - 1)).round().long()
    distinct = torch.ones_like(chosen, dtype=torch.bool)
    distinct[:, 1:] = chosen.diff(dim=1) > 0
    return chosen, distinct


def _batches(stream: Stream, recipe: Recipe, ranks: Ranks, count: int) -> Iterator[MicroBatch]:
    micro, _ = split_batch(recipe.train, ranks.world)
    return stream.micro_batches(
        start=0, stop=count * recipe.train.batch_size, batch_size=recipe.train.batch_size, micro_batch_size=micro,
        rank=ranks.rank, world=ranks.world, workers=min(1, recipe.data.workers),
    )  # fmt: skip


def _valid(tensors: dict[str, Tensor], count: Callable[[Tensor], int]) -> Tensor | None:
    return count(tensors["values"]) - tensors["padding"] if "padding" in tensors else None
