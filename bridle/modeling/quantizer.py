"""Residual quantization (Eqs. 1-3) with codebooks learned by exponential moving averages (Eqs. 9-13).

One codebook (M = 1) is plain vector quantization. Everything here is float32 whatever the model's precision, and the
codebooks are buffers: state, but never parameters. See docs/quantizer.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bridle.config import QuantizerSettings
from bridle.errors import MistakeError
from bridle.modeling.kept_precision import KeptPrecision
from bridle.modeling.kmeans import kmeans, random_rows
from bridle.modeling.lookup import Codebook, cluster_sums, full_float32, nearest_codes, rows_at_once, scores

_NORM_FLOOR = 1e-6  # a latent below this norm is not blown up to unit length, nor its gradient by more than 1e6
_COINCIDENT = 1e-3  # initial codes closer than this, against latents of unit length, count as one ...
_SEPARATION = 1e-2  # ... and are moved apart by noise of about this length


class Quantized(NamedTuple):
    """What quantization gives for positions ``[...]``."""

    codes: Tensor
    """int64 ``[..., M]``, first stage first."""
    quantized: Tensor
    """float32 ``[..., d]``, the sum of the codes (Eq. 3); in ``forward`` its gradient goes to the latents."""
    latents: Tensor
    """float32 ``[..., d]``, the input at unit length: what Eqs. 1-3 call z."""
    errors: Tensor
    """float32 ``[M]``: mean squared norm of what each stage leaves over (Eq. 2), on the input's device."""


class _StraightThrough(torch.autograd.Function):
    """The quantized values, bit for bit, with the gradient handed to the latents."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def normalize(latents: Tensor) -> Tensor:
    """``latents`` in float32 at unit length along the last axis (shorter where the norm is below 1e-6)."""
    return functional.normalize(latents.float(), dim=-1, eps=_NORM_FLOOR)


class _Prepared:
    """Codebooks made ready for lookups, anew only when they have changed; a copy of a quantizer prepares its own."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, int, list[Codebook]] | None = None

    def __reduce__(self) -> tuple[type[_Prepared], tuple[()]]:
        return _Prepared, ()

    def __call__(self, rows: Tensor) -> list[Codebook]:
        """rows: float32 ``[M, K, d]``, of which torch counts the changes in place."""
        if rows.is_inference():  # it does not count those of such tensors
            return [Codebook.of(one) for one in rows]
        if self._found is None or self._found[0] is not rows or self._found[1] != rows._version:
            self._found = rows, rows._version, [Codebook.of(one) for one in rows]
        return self._found[2]


class ResidualQuantizer(KeptPrecision):
    """M codebooks of K codes of width d; each quantizes what the ones before left over.

    State, all of it in ``state_dict``: ``codebooks`` float32 ``[M, K, d]``, ``cluster_size`` (N) float32 ``[M, K]``,
    ``code_sum`` (m) float32 ``[M, K, d]``, ``initialized`` bool. Casts of the module (``.to(torch.bfloat16)``,
    ``.half()``, ``.double()``) leave them float32. Not in ``state_dict``: ``statistics``, the n and l of Eq. 9 gathered
    since the last ``update``.
    """

    codebooks: Tensor
    cluster_size: Tensor
    code_sum: Tensor
    initialized: Tensor
    statistics: Tensor

    def __init__(self, settings: QuantizerSettings) -> None:
        super().__init__()
        self.settings = settings
        stages, size, dim = settings.codebooks, settings.codebook_size, settings.dim
        self.register_buffer("codebooks", torch.zeros(stages, size, dim, dtype=torch.float32))
        self.register_buffer("cluster_size", torch.zeros(stages, size, dtype=torch.float32))
        self.register_buffer("code_sum", torch.zeros(stages, size, dim, dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))
        # One flat tensor, counts before sums, so that one all-reduce carries every stage.
        statistics = torch.zeros(stages * size * (1 + dim), dtype=torch.float32)
        self.register_buffer("statistics", statistics, persistent=False)
        self._known_initialized = False
        self._prepared = _Prepared()

    @property
    def counts(self) -> Tensor:
        """n of Eq. 9 since the last update: float32 ``[M, K]``, a view of ``statistics``."""
        return self.statistics[: self.cluster_size.numel()].view_as(self.cluster_size)

    @property
    def sums(self) -> Tensor:
        """l of Eq. 9 since the last update: float32 ``[M, K, d]``, a view of ``statistics``."""
        return self.statistics[self.cluster_size.numel() :].view_as(self.code_sum)

    def encode(self, z: Tensor) -> Quantized:
        """Quantize ``z``, any float dtype ``[..., d]``; no gradient, no change of state.

        Raises:
            RuntimeError: the codebooks are neither initialized nor loaded.
            ValueError: the last axis of ``z`` is not d.
        """
        with torch.no_grad():
            return self._quantize(self._latents(z), learn=False)

    def decode(self, codes: Tensor) -> Tensor:
        """Eq. 3 for ``codes``, any integer dtype ``[..., M']``, the first 1 <= M' <= M stages: float32 ``[..., d]``.

        All M stages give ``encode``'s ``quantized`` bit for bit. Under ``norm: every`` it is the same sum, of codes
        that each live in the frame of their own stage's normalised residual. The codes' range is not checked here, as
        that waits for the device: see ``validate_codes``.

        Raises:
            ValueError: the last axis holds no stage or more than M.
        """
        self._check_stages(codes)
        flat = codes.reshape(-1, codes.shape[-1]).long()
        total = self.codebooks[0].index_select(0, flat[:, 0])
        for stage in range(1, flat.shape[1]):
            total.add_(self.codebooks[stage].index_select(0, flat[:, stage]))
        return total.view(*codes.shape[:-1], self.settings.dim)

    def validate_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless ``codes`` is an integer tensor ``[..., M']``, M' <= M, of values in [0, K)."""
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes: found dtype {codes.dtype}, expected integers")
        self._check_stages(codes)
        outside = codes[(codes < 0) | (codes >= self.settings.codebook_size)]
        if outside.numel():
            found, limit = int(outside[0]), self.settings.codebook_size - 1
            raise ValueError(f"codes: found {found}, expected 0 to {limit}: these codes are not from this model")

    def forward(self, z: Tensor, weights: Tensor | None = None) -> tuple[Quantized, Tensor]:
        """Quantize ``z``, any float dtype ``[..., d]``, and return the commitment loss, a float32 scalar.

        The loss is Eq. 5's second term, ``beta * ||z - sg[q]||^2`` averaged over positions, with the q of all stages,
        so that what the later stages leave over reaches the encoder too. Eq. 5's first term is the moving average's
        work. ``quantized`` has the gradient of the straight-through estimator. In training mode Eq. 9's statistics
        are gathered for ``update``.

        ``weights``, float32 ``[...]``, are those of the average (and of ``errors``) and sum to 1; a position of weight
        0 is padding, which leaves no statistics either. None: all positions alike.

        Raises:
            RuntimeError, ValueError: as ``encode``.
        """
        latents = self._latents(z)
        with torch.no_grad():
            result = self._quantize(latents.detach(), learn=self.training, weights=weights)
        with torch.autocast(z.device.type, enabled=False):
            distances = (latents - result.quantized).square().sum(-1)
            mean = distances.sum() / max(distances.numel(), 1) if weights is None else (distances * weights).sum()
            commitment = self.settings.beta * mean
        straight = _StraightThrough.apply(latents, result.quantized)
        return result._replace(quantized=straight, latents=latents), commitment

    @torch.no_grad()
    def initialize(self, latents: Tensor, generator: torch.Generator) -> None:
        """Give every stage its first codes from ``latents``, ``[S, d]``: the first batch of all ranks, in one order.

        Stage after stage on the residuals: k-means or uniform (``settings.init``), then codes used fewer than T_u
        times in the batch become random residuals of it, then codes that coincide are moved apart (a stage with
        nothing left to quantize must still be able to learn). N starts at the cluster sizes, 1 where there are none,
        and m at N times the code. With equal latents in equal order and an equal generator every rank gets the same.

        Raises:
            RuntimeError: already initialized; to start over, make a new quantizer.
            ValueError: latents of another shape, none at all, or not finite.
        """
        if self._is_initialized():
            raise RuntimeError("the codebooks are already initialized: a fresh start needs a new ResidualQuantizer")
        if latents.ndim != 2 or latents.shape[1] != self.settings.dim or len(latents) == 0:
            raise ValueError(f"latents: found shape {list(latents.shape)}, expected [S >= 1, {self.settings.dim}]")
        if not latents.isfinite().all():
            raise MistakeError("latents: the first batch holds values that are not finite")
        with full_float32(latents.device):
            points = normalize(latents)
            for stage in range(self.settings.codebooks):
                if stage > 0 and self.settings.norm == "every":
                    points = normalize(points)
                rows, sizes = self._first_codes(points, generator)
                self.codebooks[stage].copy_(rows)
                self.cluster_size[stage].copy_(sizes)
                points = points - rows[nearest_codes(points, Codebook.of(rows))]
        self.code_sum.copy_(self.cluster_size[..., None] * self.codebooks)
        self.statistics.zero_()
        self.initialized.fill_(True)

    @torch.no_grad()
    def update(self, all_reduce: Callable[[Tensor], None] | None) -> None:
        """Eqs. 10-13 with the statistics gathered since the last update, which are then cleared.

        Once per optimizer step on every rank. ``all_reduce`` sums a float32 tensor over the ranks in place; it is
        called once, for all stages together; None for a single process. Should the summed statistics hold anything not
        finite (one NaN in one rank's latents), the codebooks stay exactly as they are, on all ranks alike.
        """
        if all_reduce is not None:
            all_reduce(self.statistics)
        decay, epsilon = self.settings.decay, self.settings.epsilon
        cluster_size = decay * self.cluster_size + (1 - decay) * self.counts  # Eq. 10
        code_sum = decay * self.code_sum + (1 - decay) * self.sums  # Eq. 12
        total = cluster_size.sum(1, keepdim=True)
        smoothed = (cluster_size + epsilon) * (total / (total + self.settings.codebook_size * epsilon))  # Eq. 11
        codebooks = code_sum / smoothed[..., None]  # Eq. 13
        finite = self.statistics.isfinite().all()
        for old, new in (
            (self.cluster_size, cluster_size),
            (self.code_sum, code_sum),
            (self.codebooks, codebooks),
        ):
            old.copy_(torch.where(finite, new, old))
        self.statistics.zero_()

    @torch.no_grad()
    def soft_codes(self, z: Tensor, k: int) -> Tensor:
        """The ``k`` nearest codes of each stage, nearest first: int64 ``[..., M, k]``. For the ablation only.

        The residual follows the nearest code, so the first of each ``k`` is ``encode``'s code.

        Raises:
            RuntimeError, ValueError: as ``encode``; and ValueError for k outside 1 to K.
        """
        if not 1 <= k <= self.settings.codebook_size:
            raise ValueError(f"k: found {k}, expected 1 to {self.settings.codebook_size}")
        residual = self._latents(z).reshape(-1, self.settings.dim)
        picked: list[Tensor] = []
        with full_float32(z.device):
            for codebook in self._prepared(self.codebooks):
                residual = normalize(residual) if self.settings.norm == "every" and picked else residual
                # Equal codes get one score, so that the stable sort puts the lowest index first.
                ranked = scores(residual, codebook).index_select(1, codebook.first).sort(dim=1, stable=True).indices
                picked.append(ranked[:, :k])
                residual = residual - codebook.rows.index_select(0, ranked[:, 0])
        return torch.stack(picked, dim=1).view(*z.shape[:-1], self.settings.codebooks, k)

    def _latents(self, z: Tensor) -> Tensor:
        """float32 latents at unit length; refuses what cannot be quantized."""
        if not self._is_initialized():
            raise RuntimeError("the codebooks are not initialized: call initialize() or load a trained state first")
        if z.shape[-1] != self.settings.dim:
            raise ValueError(f"z: found width {z.shape[-1]}, expected {self.settings.dim}")
        with torch.autocast(z.device.type, enabled=False):
            return normalize(z)

    def _quantize(self, latents: Tensor, *, learn: bool, weights: Tensor | None = None) -> Quantized:
        """Eqs. 1-3 for float32 ``[..., d]``; ``learn`` adds Eq. 9's statistics; weights: as in ``forward``."""
        flat = latents.reshape(-1, self.settings.dim)
        at_once = rows_at_once(flat.device, self.settings.codebook_size)
        shares = None if weights is None else weights.flatten().split(at_once)
        errors = flat.new_zeros(self.settings.codebooks)
        with full_float32(flat.device):
            codebooks = self._prepared(self.codebooks)
            parts = [
                self._quantize_part(part, codebooks, errors, learn=learn, weights=None if shares is None else shares[i])
                for i, part in enumerate(flat.split(at_once))
            ]
        codes, quantized = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return Quantized(
            codes.view(*latents.shape[:-1], self.settings.codebooks),
            quantized.view(latents.shape),
            latents,
            errors.div_(max(len(flat), 1)) if weights is None else errors,
        )

    def _quantize_part(
        self, latents: Tensor, codebooks: list[Codebook], errors: Tensor, *, learn: bool, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes ``[S, M]`` and their sum ``[S, d]`` of ``latents [S, d]``; adds squared norms, each times its weight
        ``[S]`` where there are any, to ``errors``."""
        codes: list[Tensor] = []
        residual = quantized = latents
        for stage, codebook in enumerate(codebooks):
            if stage > 0 and self.settings.norm == "every":
                residual = normalize(residual)
            index = nearest_codes(residual, codebook)
            if learn:
                counts, sums = self._counted(residual, index, weights)
                self.counts[stage].add_(counts)
                self.sums[stage].add_(sums)
            chosen = codebook.rows.index_select(0, index)
            residual = residual - chosen if stage == 0 else residual.sub_(chosen)
            quantized = chosen if stage == 0 else quantized.add_(chosen)
            if weights is None:
                errors[stage].add_(torch.linalg.vector_norm(residual).square())
            else:
                errors[stage].add_(residual.square().sum(-1) @ weights)
            codes.append(index)
        return torch.stack(codes, dim=1), quantized

    def _counted(self, points: Tensor, index: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Eq. 9 without the points of weight 0: they go to a cluster behind the last one, which is cut off."""
        size = self.settings.codebook_size
        if weights is None:
            return cluster_sums(points, index, size)
        counts, sums = cluster_sums(points, torch.where(weights > 0, index, size), size + 1)
        return counts[:size], sums[:size]

    def _first_codes(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A stage's first codes, float32 ``[K, d]``, and their N, float32 ``[K]``, from its residuals ``[S, d]``."""
        settings = self.settings
        size = settings.codebook_size
        if settings.init == "kmeans":
            rows = kmeans(points, size, settings.kmeans_iterations, generator)
        else:
            # sqrt(3) times the inputs' root mean square gives the uniform codes the inputs' variance.
            rows = _uniform(size, points, generator) * (3 * points.square().mean()).sqrt()
        counts, _ = cluster_sums(points, nearest_codes(points, Codebook.of(rows)), size)
        sizes = counts.clamp(min=1) if settings.init == "kmeans" else torch.ones_like(counts)
        unused = (counts < settings.reset_threshold).nonzero().squeeze(1)
        rows[unused] = points[random_rows(len(points), len(unused), generator).to(points.device)]
        sizes[unused] = 1.0
        return _separated(rows, generator), sizes

    def _check_stages(self, codes: Tensor) -> None:
        stages = codes.shape[-1] if codes.ndim else 0
        if not 1 <= stages <= self.settings.codebooks:
            raise ValueError(f"codes: found {stages} stages in the last axis, expected 1 to {self.settings.codebooks}")

    def _is_initialized(self) -> bool:
        """Reads the device only until it first says yes."""
        if not self._known_initialized:
            self._known_initialized = bool(self.initialized)
        return self._known_initialized


def _uniform(size: int, points: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1), float32 ``[size, d]``, on the device of ``points``."""
    drawn = torch.rand(size, points.shape[1], generator=generator, device=generator.device)
    return drawn.mul_(2).sub_(1).to(points.device)


def _separated(rows: Tensor, generator: torch.Generator) -> Tensor:
    """``rows`` ``[K, d]`` with noise added to each that (nearly) coincides with one of a lower index."""
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    coincident = (apart < _COINCIDENT).tril(-1).any(1)
    noise = _uniform(len(rows), rows, generator) * (_SEPARATION * (3 / rows.shape[1]) ** 0.5)
    return torch.where(coincident[:, None], rows + noise, rows)
