"""A model in memory: bytes, files or tensors to codes, embeddings and quantized latents. `bridle.load` makes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bridle.folder_config import ModelConfig
from bridle.modalities.clip import Clip, Modality, TooLargeError
from bridle.modalities.joining import Place, joined
from bridle.modeling.encoder import Encoder
from bridle.modeling.tokenizer import Tokenizer

T = TypeVar("T")
CLIPS_AT_ONCE = 8
"""Windows per forward pass when a whole file is tokenized; bounds memory."""


@dataclass(frozen=True)
class CodeStream:
    """The codes of one file.

    codes: int64 ``[N, M]``, N row-major over `grid`, the first axis (time, where it exists) outermost.
    grid: positions along each axis, e.g. ``{"time": 62, "frequency": 8}``.
    duration_s: seconds of content; none without time.
    starts_s: start of each window, in seconds; empty without time.
    """

    modality: str
    codes: Tensor
    grid: dict[str, int]
    codebook_size: int
    duration_s: float | None
    starts_s: list[float]

    @property
    def codes_per_second(self) -> float | None:
        """Codes of all codebooks per second of content; none without time."""
        return self.codes.numel() / self.duration_s if self.duration_s else None

    @classmethod
    def from_windows(
        cls, modality: str, codebook_size: int, places: Sequence[Place], codes: Sequence[Tensor]
    ) -> CodeStream:
        """Joins the codes ``[N, M]`` of consecutive windows and cuts those of the padding."""
        extent = joined(places)
        return cls(
            modality=modality,
            codes=torch.cat([window[: place.positions] for place, window in zip(places, codes, strict=True)]),
            grid=extent.grid,
            codebook_size=codebook_size,
            duration_s=extent.duration_s,
            starts_s=extent.starts_s,
        )


class BridleModel:
    """A loaded model: bytes, files or tensors to codes, embeddings and quantized latents. Made by `load`."""

    def __init__(
        self, config: ModelConfig, modality: Modality, encoder: Encoder, tokenizer: Tokenizer, digest: str
    ) -> None:
        self.config = config
        self.modality = modality
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.sha256 = digest
        self.encoder.eval().requires_grad_(False)
        self.tokenizer.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.embed.weight.device

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the model is, as plain data."""
        quantizer = self.config.quantizer
        return {
            "name": self.config.name,
            "modality": self.config.modality,
            "tokenizer": self.config.tokenizer,
            "codebooks": quantizer.codebooks,
            "codebook_size": quantizer.codebook_size,
            "dim": quantizer.dim,
            "width": self.config.encoder.width,
            "grid": dict(self.modality.grid),
            "positions_per_second": self.modality.positions_per_second,
            "version": self.config.bridle,
            "sha256": self.sha256,
            "trained": self.config.trained,
        }

    @torch.inference_mode()
    def codes(self, values: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Normalised clips ``[B, C, *S]`` to int64 codes ``[B, N, M]``, on the model's device.

        valid: positions of each clip that are content (`Clip.positions`); the padding behind them changes no code
        before it, and its own codes mean nothing. None: all N.
        """
        return self.tokenizer.codes(*self._placed(values, valid))

    @torch.inference_mode()
    def embed(self, values: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Normalised clips ``[B, C, *S]`` to the encoder's patch embeddings, float32 ``[B, N, width]``; valid: as in
        `codes`."""
        return self.encoder.embeddings(*self._placed(values, valid)).float()

    @torch.inference_mode()
    def latents(self, values: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Normalised clips ``[B, C, *S]`` to the tokenizer's latents before quantization, ``[B, N, d]``; valid: as in
        `codes`."""
        return self.tokenizer.latents(*self._placed(values, valid))

    @torch.inference_mode()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes ``[..., M']`` (the first M' codebooks, M' up to M) to quantized latents, float32 ``[..., d]``.

        Raises:
            ValueError: codes out of range, too many codebooks, or not integers.
        """
        self.tokenizer.quantizer.validate_codes(codes)  # where they are: looking at them on a GPU waits for it
        return self.tokenizer.quantizer.decode(_sent(codes, self.device))

    def tokenize(self, source: bytes | str | Path) -> CodeStream:
        """Codes of a whole file, given as its bytes or its path.

        Raises:
            ClipError: content that is undecodable, of the wrong kind or over a limit.
            OSError: the file cannot be read.
        """
        places: list[Place] = []
        codes: list[Tensor] = []
        for batch in batched(self.modality.windows(read_source(source, self.modality.limits.max_bytes)), CLIPS_AT_ONCE):
            codes += self.codes(*stacked(batch)).cpu().unbind(0)
            places += [Place.of(clip) for clip in batch]
        return CodeStream.from_windows(self.config.modality, self.config.quantizer.codebook_size, places, codes)

    def encode(self, source: bytes | str | Path) -> Tensor:
        """Encoder embeddings of a whole file, float32 ``[N, width]``, in the order of `tokenize`'s codes.

        Raises:
            ClipError, OSError: see `tokenize`.
        """
        kept: list[Tensor] = []
        for batch in batched(self.modality.windows(read_source(source, self.modality.limits.max_bytes)), CLIPS_AT_ONCE):
            embeddings = self.embed(*stacked(batch)).cpu()
            kept += [found[: clip.positions] for clip, found in zip(batch, embeddings, strict=True)]
        return torch.cat(kept)

    def _placed(self, values: Tensor, valid: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
        placed = values.to(device=self.device, dtype=self.encoder.embed.weight.dtype)
        return placed, content_positions(self.encoder, placed, valid)


def content_positions(encoder: Encoder, values: Tensor, valid: Sequence[int] | None) -> Tensor | None:
    """Positions of content of each clip, int64 on the values' device; none where nothing is padded, so that attention
    needs no mask."""
    if valid is None or min(valid) >= encoder.patch.count(values):
        return None
    return _sent(torch.tensor(list(valid), dtype=torch.int64), values.device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. To CUDA from pinned memory: a copy from other memory waits for all that the GPU has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_source(source: bytes | str | Path, max_bytes: int) -> bytes:
    """A file's bytes, by its path or themselves.

    Raises:
        TooLargeError: it has more than `max_bytes`. OSError: it cannot be read.
    """
    if isinstance(source, bytes):
        return source
    path = Path(source)
    if path.stat().st_size > max_bytes:
        raise TooLargeError(f"{path}: {path.stat().st_size} bytes, above max_bytes = {max_bytes}; split the file")
    return path.read_bytes()


def batched(clips: Iterable[T], count: int) -> Iterator[list[T]]:
    """Runs of up to `count` clips, or of what goes with them."""
    batch: list[T] = []
    for clip in clips:
        batch.append(clip)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def stacked(clips: Sequence[Clip]) -> tuple[Tensor, list[int]]:
    """Values ``[B, C, *S]`` of clips and their positions of content: what `BridleModel.codes` and `embed` take."""
    return torch.stack([clip.values for clip in clips]), [clip.positions for clip in clips]
