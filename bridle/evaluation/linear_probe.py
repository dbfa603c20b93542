"""The paper's linear probe: a linear layer that AdamW trains on frozen features.

Table 5 gives optimizer, weight decay, loss (BCE), learning rates, epochs, batches and no masking. What it leaves open
is MAE's (He et al. 2022, A.1): features in units of their deviations (its BatchNorm without affine), first weights of
deviation 0.01, a ninth of the steps as warm-up, then half a cosine to 0. Clips are not augmented, as each file is one
vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bridle.evaluation.probe_scores import standardised

WEIGHT_DECAY = 1e-4
FIRST_DEVIATION = 0.01
WARM_UP = 1 / 9
LARGE = 200_000
"""Files to learn from: with so many, sounds are probed as the paper's AS-2M, with fewer as its AS-20K."""


@dataclass(frozen=True)
class ProbeSettings:
    """lr: the greatest; epochs: passes over the files to learn from; batch: files per step, of all GPUs together."""

    lr: float
    epochs: int
    batch: int


def paper_settings(modality: str, files: int) -> ProbeSettings:
    """Table 5's, for so many files to learn from. It has none for films, which get those of pictures."""
    if modality == "audio":
        return ProbeSettings(4e-3, 250, 256) if files >= LARGE else ProbeSettings(4e-2, 400, 256)
    return ProbeSettings(2e-3, 300, 1024)


def trained_scores(
    copies: Sequence[Tensor],
    scaled: bool,
    targets: Tensor,
    splits: Sequence[tuple[Tensor, Tensor]],
    settings: ProbeSettings,
    seed: int,
) -> list[Tensor]:
    """Logits float64 ``[n, C]`` of each of R copies ``[n, D]``, for the files that a split tests; the others' are 0.

    A layer is trained anew for each split; the copies, which share first weights and the order of files, at once.
    """
    found = torch.zeros(len(copies), *targets.shape, dtype=torch.float64)
    for learn, test in splits:
        pairs = [standardised(copy[learn].double(), copy[test].double(), scaled) for copy in copies]
        known, asked = (torch.stack(parts).float() for parts in zip(*pairs, strict=True))
        weight, bias = _trained(known, targets[learn].float(), settings, seed)
        found[:, test] = torch.baddbmm(bias, asked, weight).double()
    return list(found)


def learning_rate(step: int, steps: int, greatest: float) -> float:
    """Of a step, counted from 0: linear warm-up, then half a cosine."""
    warm_up = WARM_UP * steps
    if step + 1 < warm_up:
        return greatest * (step + 1) / warm_up
    return greatest * 0.5 * (1 + math.cos(math.pi * (step - warm_up + 1) / (steps - warm_up + 1)))


def _trained(known: Tensor, wanted: Tensor, settings: ProbeSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Weights ``[R, D, C]`` and biases ``[R, 1, C]``; known: float32 ``[R, n, D]``; wanted: float32 ``[n, C]``."""
    copies, files, columns = known.shape
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty(columns, wanted.shape[1])
    torch.nn.init.trunc_normal_(first, std=FIRST_DEVIATION, generator=generator)
    weight = first.repeat(copies, 1, 1).requires_grad_()
    bias = torch.zeros(copies, 1, wanted.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], weight_decay=WEIGHT_DECAY, fused=True)
    per_epoch = -(-files // settings.batch)
    for step in range(settings.epochs * per_epoch):
        place = step % per_epoch
        if not place:
            order = torch.randperm(files, generator=generator) if per_epoch > 1 else torch.arange(files)
        rows = order[place * settings.batch : (place + 1) * settings.batch]
        logits = torch.baddbmm(bias, known[:, rows], weight)
        loss = functional.binary_cross_entropy_with_logits(logits, wanted[rows].expand_as(logits))
        optimizer.zero_grad()
        (loss * copies).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings.epochs * per_epoch, settings.lr)
        optimizer.step()
    return weight.detach(), bias.detach()
