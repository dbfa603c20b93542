"""The model folder: the only thing that leaves training, and all that serving, evaluation and users need.

``config.json`` says what the model is, ``model.safetensors`` holds encoder and tokenizer, ``README.md`` is its card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle import __version__
from bridle.config import EncoderSettings, QuantizerSettings
from bridle.files import read_json, sha256, whole_folder
from bridle.modalities import build_modality
from bridle.modalities.clip import Clip, Limits, Modality, TooLargeError
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import PatchShape
from bridle.modeling.tokenizer import ColdStartTokenizer, LearnedTokenizer, Tokenizer
from bridle.settings import RecipeError, Settings, parse_settings

FORMAT = 1
"""Version of the folder's layout; a folder of another version is refused."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLIPS_AT_ONCE = 8
"""Windows per forward pass when a whole file is tokenized; bounds memory."""


class ModelError(ValueError):
    """A folder that is no model, or not one that this version can load."""


class ModelConfig(Settings):
    """What `config.json` holds."""

    format: int
    """Version of the layout."""
    bridle: str
    """Version of the package that wrote it."""
    name: str
    """Name of the model, for people and for `model=`."""
    modality: str
    """Name in the registry of modalities."""
    clip: dict[str, Any]
    """The modality's settings."""
    tokenizer: str
    """`cold_start` (a random projection) or `learned`."""
    encoder: EncoderSettings
    quantizer: QuantizerSettings
    trained: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: recipe, phase, clips seen. Informative."""


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
        cls, modality: str, codebook_size: int, clips: Sequence[Clip], codes: Sequence[Tensor]
    ) -> CodeStream:
        """Joins the codes ``[N, M]`` of consecutive windows and cuts those of the padding."""
        axes = list(clips[0].grid)
        kept = []
        for clip, window in zip(clips, codes, strict=True):
            per_step = window.shape[0] // clip.grid[axes[0]]
            kept.append(window[: clip.valid * per_step])
        durations = [clip.duration_s for clip in clips if clip.duration_s is not None]
        return cls(
            modality=modality,
            codes=torch.cat(kept),
            grid={axes[0]: sum(clip.valid for clip in clips), **{axis: clips[0].grid[axis] for axis in axes[1:]}},
            codebook_size=codebook_size,
            duration_s=sum(durations) if durations else None,
            starts_s=[clip.start_s for clip in clips if clip.start_s is not None],
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
        return self.tokenizer.codes(self._placed(values), self._valid(values, valid))

    @torch.inference_mode()
    def embed(self, values: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Normalised clips ``[B, C, *S]`` to the encoder's patch embeddings, float32 ``[B, N, width]``; valid: as in
        `codes`."""
        return self.encoder.embeddings(self._placed(values), self._valid(values, valid)).float()

    @torch.inference_mode()
    def latents(self, values: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Normalised clips ``[B, C, *S]`` to the tokenizer's latents before quantization, ``[B, N, d]``; valid: as in
        `codes`."""
        return self.tokenizer.latents(self._placed(values), self._valid(values, valid))

    @torch.inference_mode()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes ``[..., M']`` (the first M' codebooks, M' up to M) to quantized latents, float32 ``[..., d]``.

        Raises:
            ValueError: codes out of range, too many codebooks, or not integers.
        """
        codes = codes.to(self.device)
        self.tokenizer.quantizer.validate_codes(codes)
        return self.tokenizer.quantizer.decode(codes)

    def tokenize(self, source: bytes | str | Path) -> CodeStream:
        """Codes of a whole file, given as its bytes or its path.

        Raises:
            ClipError: content that is undecodable, of the wrong kind or over a limit.
            OSError: the file cannot be read.
        """
        clips: list[Clip] = []
        codes: list[Tensor] = []
        for batch in batched(self.modality.windows(self._read(source)), CLIPS_AT_ONCE):
            codes += self.codes(*stacked(batch)).cpu().unbind(0)
            clips += [without_values(clip) for clip in batch]
        return CodeStream.from_windows(self.config.modality, self.config.quantizer.codebook_size, clips, codes)

    def encode(self, source: bytes | str | Path) -> Tensor:
        """Encoder embeddings of a whole file, float32 ``[N, width]``, in the order of `tokenize`'s codes.

        Raises:
            ClipError, OSError: see `tokenize`.
        """
        clips: list[Clip] = []
        embeddings: list[Tensor] = []
        for batch in batched(self.modality.windows(self._read(source)), CLIPS_AT_ONCE):
            embeddings += self.embed(*stacked(batch)).cpu().unbind(0)
            clips += [without_values(clip) for clip in batch]
        return CodeStream.from_windows(
            self.config.modality, self.config.quantizer.codebook_size, clips, embeddings
        ).codes

    def _placed(self, values: Tensor) -> Tensor:
        return values.to(device=self.device, dtype=self.encoder.embed.weight.dtype)

    def _valid(self, values: Tensor, valid: Sequence[int] | None) -> Tensor | None:
        """On the model's device; none where nothing is padded, so that attention needs no mask."""
        if valid is None or min(valid) >= self.encoder.patch.count(values):
            return None
        return torch.tensor(list(valid), dtype=torch.int64).to(self.device)

    def _read(self, source: bytes | str | Path) -> bytes:
        if isinstance(source, bytes):
            return source
        path = Path(source)
        limit = self.modality.limits.max_bytes
        if path.stat().st_size > limit:
            raise TooLargeError(f"{path}: {path.stat().st_size} bytes, above max_bytes = {limit}; split the file")
        return path.read_bytes()


def batched(clips: Iterable[Clip], count: int) -> Iterable[list[Clip]]:
    """Runs of up to `count` clips."""
    batch: list[Clip] = []
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


def without_values(clip: Clip) -> Clip:
    """A clip's bookkeeping without its tensor, so that a long file's clips can be forgotten."""
    return Clip(torch.empty(0), clip.grid, clip.valid, clip.start_s, clip.duration_s)


def patch_shape(modality: Modality) -> PatchShape:
    """How the modality's clips are cut."""
    return PatchShape(modality.channels, tuple(modality.patch))


def save_model(
    folder: Path,
    *,
    name: str,
    modality: str,
    clip: Mapping[str, Any],
    encoder_settings: EncoderSettings,
    quantizer_settings: QuantizerSettings,
    encoder: Mapping[str, Tensor],
    tokenizer: Mapping[str, Tensor],
    learned: bool,
    trained: Mapping[str, Any],
) -> None:
    """Writes a model folder, whole or not at all.

    encoder, tokenizer: state dicts; learned: whether the tokenizer is `LearnedTokenizer`'s (else the cold start's).
    """
    config = ModelConfig(
        format=FORMAT,
        bridle=__version__,
        name=name,
        modality=modality,
        clip=dict(clip),
        tokenizer="learned" if learned else "cold_start",
        encoder=encoder_settings,
        quantizer=quantizer_settings,
        trained=dict(trained),
    )
    weights = {f"encoder.{key}": value for key, value in encoder.items()}
    weights |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    with whole_folder(folder) as aside:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()}, aside / "model.safetensors"
        )
        (aside / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_card(config), encoding="utf-8")


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: str = "float32", limits: Limits | None = None
) -> BridleModel:
    """Loads a model folder.

    device: where to put it; dtype: `float32` or `bfloat16` (the quantizer stays in float32); limits: bounds on what a
    file may unfold to.

    Raises:
        ModelError: no such folder, not a model, another format version, damaged or missing weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
    modality = build_modality(config.modality, config.clip, limits)
    patch = patch_shape(modality)
    weights_file = folder / "model.safetensors"
    try:
        weights = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        advice = "make it readable or export the model again"
        raise ModelError(f"{weights_file}: cannot be read ({error}); {advice}") from None
    encoder = Encoder(config.encoder, patch)
    tokenizer: Tokenizer
    if config.tokenizer == "learned":
        tokenizer = LearnedTokenizer(config.encoder, config.quantizer, patch)
    else:
        tokenizer = ColdStartTokenizer(config.quantizer, patch)
    for part, module in (("encoder", encoder), ("tokenizer", tokenizer)):
        _load_strictly(
            module,
            {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")},
            weights_file,
        )
        module.to(device=device, dtype=DTYPES[dtype])
    return BridleModel(config, modality, encoder, tokenizer, sha256(weights_file))


def read_config(folder: Path) -> ModelConfig:
    """Reads and checks `config.json`.

    Raises:
        ModelError: see `load`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json there; give a model folder, such as runs/NAME/models/final")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ModelError(f"{path}: format {found!r}, expected {FORMAT}; export the model with this version of bridle")
    try:
        return parse_settings(ModelConfig, raw, str(path))
    except RecipeError as error:
        raise ModelError(str(error)) from None


def is_whole(folder: Path) -> bool:
    """Whether a model folder is there, readable and of this version; reads no weights."""
    try:
        read_config(folder)
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return bool(weights.keys())
    except (ValueError, OSError, SafetensorError):
        return False


def _load_strictly(module: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{file}: weights do not fit config.json beside it: {' '.join(str(error).split())}") from None


def _card(config: ModelConfig) -> str:
    quantizer = config.quantizer
    trained = ", ".join(f"{key} {value}" for key, value in config.trained.items()) or "nothing recorded"
    return f"""# {config.name}

A BRIDLE model for {config.modality}: an encoder of width {config.encoder.width} and depth {config.encoder.depth}, and a
residual-quantization tokenizer with {quantizer.codebooks} codebooks of {quantizer.codebook_size} codes of width
{quantizer.dim} ({"a random projection, from the cold start" if config.tokenizer == "cold_start" else "learned"}).

```python
import bridle

model = bridle.load("path/to/this/folder")
stream = model.tokenize("file")   # stream.codes: [positions, codebooks]
```

Trained with bridle {config.bridle}: {trained}.
"""
