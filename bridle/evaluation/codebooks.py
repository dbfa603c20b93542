"""How well a tokenizer uses its codebooks: the metrics of Appendix D, and their measurement over a whole data set.

Natural logarithms. The paper's Table 6 does not follow its own Eq. 31; here the equation holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridle.data.errors import ShardError
from bridle.data.handover import packed, unpacked
from bridle.data.shards import ShardSet
from bridle.errors import MistakeError
from bridle.modalities.clip import ClipError, Modality
from bridle.model_folder import BridleModel

BINS = 40
"""Bars of a histogram of code norms."""


def code_usage_rate(counts: Tensor) -> Tensor:
    """CUR, Eq. 29: the share of a codebook's codes that occur at all. counts: ``[..., K]`` to float64 ``[...]``."""
    return (counts > 0).double().mean(-1)


def usage_entropy(counts: Tensor) -> Tensor:
    """UE, Eq. 30, in nats: -sum p ln p with p = counts / sum(counts), 0 ln 0 = 0. ``[..., K]`` to float64 ``[...]``.

    Without any counts it is 0.
    """
    counts = counts.double()
    return torch.special.entr(counts / counts.sum(-1, keepdim=True).clamp(min=1)).sum(-1)


def effective_code_usage(counts: Tensor) -> Tensor:
    """ECU, Eq. 31: CUR * UE / ln K, from 0 to 1 (all codes equally often). ``[..., K]`` to float64 ``[...]``."""
    return code_usage_rate(counts) * usage_entropy(counts) / math.log(counts.shape[-1])


def perplexity(counts: Tensor) -> Tensor:
    """exp(UE): the number of equally frequent codes that would have this entropy. ``[..., K]`` to float64 ``[...]``."""
    return usage_entropy(counts).exp()


def dead_codes(counts: Tensor) -> Tensor:
    """Codes that never occur. ``[..., K]`` to int64 ``[...]``."""
    return (counts == 0).sum(-1)


@dataclass
class CodebookUsage:
    """What a data set makes of a tokenizer's codebooks.

    counts: int64 ``[M, K]``, how often each code occurred (the N of Eq. 30).
    errors: float64 ``[M]``, sum over positions of the squared norm of what each stage leaves over (Eq. 2).
    positions, windows, files: how much was looked at, padding not counted. skipped: files that could not be read.
    """

    counts: Tensor
    errors: Tensor
    positions: int = 0
    windows: int = 0
    files: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def error(self) -> Tensor:
        """Mean squared error after each stage, float64 ``[M]``; latents have unit length, so 1 is "nothing said"."""
        return self.errors / max(self.positions, 1)


@dataclass(frozen=True)
class ReadWindow:
    """One window of a file on its way to the model: values ``[C, *S]``; positions: its codes that are content."""

    values: Tensor
    positions: int
    first: bool
    """Whether a file begins here."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"values": packed(self.values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"values": unpacked(state["values"])})


@dataclass(frozen=True)
class Skipped:
    """A file that cannot be decoded, and why; begun: whether windows of it came before the fault."""

    reason: str
    begun: bool


class Windows(torch.utils.data.IterableDataset[ReadWindow | Skipped]):
    """All windows of all files of a set of shards; loader processes share the files out among themselves."""

    def __init__(self, shards: ShardSet, modality: Modality) -> None:
        self.shards = shards
        self.modality = modality

    def __iter__(self) -> Iterator[ReadWindow | Skipped]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.shards), step):
            yield from self.of(index)

    def of(self, index: int) -> Iterator[ReadWindow | Skipped]:
        """Those of one file."""
        begun = False
        try:
            for clip in self.modality.windows(self.shards.data(index)):
                per_step = math.prod(clip.grid.values()) // next(iter(clip.grid.values()))
                yield ReadWindow(clip.values, clip.valid * per_step, not begun)
                begun = True
        except (ClipError, ShardError) as error:
            shard, key = self.shards.where(index)
            yield Skipped(f"{shard}, key {key}: {' '.join(str(error).split())}", begun)


@torch.inference_mode()
def measure(model: BridleModel, windows: Iterable[ReadWindow | Skipped], batch_size: int = 8) -> CodebookUsage:
    """Tokenizes windows and counts. Changes nothing in the model.

    Raises:
        ValueError: no window at all could be read.
    """
    stages, size, _ = model.tokenizer.quantizer.codebooks.shape
    usage = CodebookUsage(torch.zeros(stages, size, dtype=torch.int64), torch.zeros(stages, dtype=torch.float64))
    batch: list[ReadWindow] = []
    for item in windows:
        if isinstance(item, Skipped):
            usage.skipped.append(item.reason)
            continue
        batch.append(item)
        if len(batch) == batch_size:
            _count(model, batch, usage)
            batch = []
    if batch:
        _count(model, batch, usage)
    if not usage.windows:
        raise MistakeError(f"none of {len(usage.skipped)} files could be read; the first: {usage.skipped[0]}")
    return usage


def _count(model: BridleModel, batch: list[ReadWindow], usage: CodebookUsage) -> None:
    values = torch.stack([window.values for window in batch])
    latents = model.latents(values, [window.positions for window in batch])
    content = torch.cat([found[: window.positions] for window, found in zip(batch, latents, strict=True)])
    quantized = model.tokenizer.quantizer.encode(content)
    for stage, codes in enumerate(quantized.codes.cpu().T):
        usage.counts[stage] += torch.bincount(codes, minlength=usage.counts.shape[1])
    usage.errors += quantized.errors.cpu().double() * len(content)
    usage.positions += len(content)
    usage.windows += len(batch)
    usage.files += sum(window.first for window in batch)


def code_norms(model: BridleModel) -> Tensor:
    """Euclidean norms of all codes, float32 ``[M, K]`` on the CPU: what Figures 2 and 3 show the distribution of."""
    return model.tokenizer.quantizer.codebooks.norm(dim=-1).cpu()


def figures(usage: CodebookUsage, norms: Tensor) -> list[dict[str, Any]]:
    """All figures of each codebook, as plain data; norms: ``[M, K]``. `norm_edges` are those of `norm_counts`."""
    counts = usage.counts
    rows = []
    for stage in range(len(counts)):
        bars, edges = np.histogram(norms[stage].numpy(), BINS)
        rows.append(
            {
                "codebook": stage + 1,
                "cur": code_usage_rate(counts[stage]).item(),
                "ue": usage_entropy(counts[stage]).item(),
                "ecu": effective_code_usage(counts[stage]).item(),
                "perplexity": perplexity(counts[stage]).item(),
                "dead": int(dead_codes(counts[stage])),
                "error": usage.error[stage].item(),
                "norm_mean": norms[stage].mean().item(),
                "norm_counts": bars.tolist(),
                "norm_edges": edges.tolist(),
                "counts": counts[stage].tolist(),
            }
        )
    return rows
