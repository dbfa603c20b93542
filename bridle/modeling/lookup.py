"""Nearest-code lookup and cluster sums in true float32: what the residual quantizer and k-means share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK = 8192  # rows per distance matrix on a CPU: bounds memory, and keeps a stage's working set near the cache
_LARGEST = 2**28  # numbers in a distance matrix on a GPU, 1 GiB: fewer and larger kernels are faster there


class _FullFloat32:
    """Counts who needs exact float32 products: the first in switches TF32 and bf16 products off, the last restores.

    The switch is process-wide. Counting rather than saving and restoring per call means that threads that look up at
    the same time neither wait for each other nor restore a setting under each other's feet.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._users = 0
        self._before = "none"

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._backend.fp32_precision
                self._backend.fp32_precision = "ieee"
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._backend.fp32_precision = self._before


_CUDA = _FullFloat32(torch.backends.cuda.matmul)
_CPU = _FullFloat32(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Autocast off, and no TF32 or bf16 inside float32 matrix products, whatever the process has allowed."""
    with torch.autocast(device.type, enabled=False), _CUDA if device.type == "cuda" else _CPU:
        yield


def rows_at_once(device: torch.device, size: int) -> int:
    """How many points are looked up in `size` codes at once."""
    return max(_CHUNK, _LARGEST // size) if device.type == "cuda" else _CHUNK


class Codebook(NamedTuple):
    """A codebook with what every lookup in it needs."""

    rows: Tensor
    """float32 ``[K, d]``."""
    squares: Tensor
    """float32 ``[K]``, squared norms of the rows."""
    first: Tensor
    """int64 ``[K]``: the lowest index that holds an equal row, most often the row's own."""

    @classmethod
    def of(cls, rows: Tensor) -> Codebook:
        """Prepare ``rows``, float32 ``[K, d]``."""
        return cls(rows, rows.square().sum(-1), _first_equal(rows))


def _first_equal(rows: Tensor) -> Tensor:
    """int64 ``[K]``: for each row the lowest index of a row with equal numbers.

    A matrix product may round equal columns differently (edge blocks take another kernel), so argmin alone could
    pick the later of two equal codes. Equal rows are found by an integer hash, which no summation order changes, and
    each hit is confirmed, so that a collision cannot join two different codes.
    """
    multipliers = _hash_multipliers(rows.shape[-1], rows.device)
    bits = (rows + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal 0.0 bit for bit
    hashes = (bits * multipliers).sum(-1)
    ordered, order = hashes.sort(stable=True)
    first = order[torch.searchsorted(ordered, hashes)]
    own = torch.arange(len(rows), device=rows.device)
    return torch.where((rows[first] == rows).all(-1), first, own)


def _hash_multipliers(dim: int, device: torch.device) -> Tensor:
    """Made where they are used, since a copy would wait: splitmix64's mixing of 1 to `dim`, int64 ``[dim]``."""
    mixed = torch.arange(1, dim + 1, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return mixed ^ (mixed >> 31)


def scores(points: Tensor, codebook: Codebook) -> Tensor:
    """``||c||^2 - 2 e.c``, float32 ``[S, K]``: Eq. 1's squared distance less ``||e||^2``, which all codes share."""
    return torch.addmm(codebook.squares, points, codebook.rows.t(), alpha=-2)


def nearest_codes(points: Tensor, codebook: Codebook) -> Tensor:
    """Eq. 1 for ``points``, float32 ``[S, d]``: int64 ``[S]``, ties to the lowest index (argmin takes the first)."""
    at_once = rows_at_once(points.device, len(codebook.rows))
    indices = [scores(part, codebook).argmin(1) for part in points.split(at_once)]
    return codebook.first[torch.cat(indices)]


def cluster_sums(points: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eq. 9: how many points took each code, float32 ``[size]``, and their sums, float32 ``[size, d]``.

    The result is the same every time on one device, and nothing waits for it. On a CPU ``index_add_`` adds points in
    their order; CUDA's has no order, so there the sums are a product.
    """
    if points.device.type == "cpu":
        counts = points.new_zeros(size).index_add_(0, codes, points.new_ones(len(codes)))
        return counts, points.new_zeros(size, points.shape[1]).index_add_(0, codes, points)
    return sums_by_product(points, codes, size)


def sums_by_product(points: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`cluster_sums` as a product with one row of zeros and a one for each point: for devices that multiply faster
    than they sort or scatter. A point that is not finite spoils all sums, and not its own alone."""
    every, at_once = torch.arange(size, device=codes.device), rows_at_once(points.device, size)
    counts, sums = points.new_zeros(size), points.new_zeros(size, points.shape[1])
    with full_float32(points.device):
        for some, chosen in zip(points.split(at_once), codes.split(at_once), strict=True):
            shares = (chosen[:, None] == every).to(points.dtype)
            counts.add_(shares.sum(0))
            sums.addmm_(shares.t(), some)
    return counts, sums
