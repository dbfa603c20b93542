"""The model folder: the only thing that leaves training, and all that serving, evaluation and users need.

``config.json`` says what the model is, ``model.safetensors`` holds encoder and tokenizer, ``README.md`` is its card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle import __version__
from bridle.config import EncoderSettings, QuantizerSettings
from bridle.files import read_json, sha256, whole_folder
from bridle.modalities import build_modality
from bridle.modalities.clip import Limits, Modality
from bridle.model import BridleModel, CodeStream, ModelConfig, stacked
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import PatchShape
from bridle.modeling.tokenizer import ColdStartTokenizer, LearnedTokenizer, Tokenizer
from bridle.settings import RecipeError, parse_settings

__all__ = [
    "BridleModel",
    "CodeStream",
    "ModelConfig",
    "ModelError",
    "load",
    "patch_shape",
    "read_config",
    "save_model",
    "stacked",
]

FORMAT = 1
"""Version of the folder's layout; a folder of another version is refused."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelError(ValueError):
    """A folder that is no model, or not one that this version can load."""


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
        raise ModelError(_no_model(folder))
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ModelError(f"{path}: format {found!r}, expected {FORMAT}; export the model with this version of bridle")
    try:
        return parse_settings(ModelConfig, raw, str(path))
    except RecipeError as error:
        raise ModelError(str(error)) from None


def _no_model(folder: Path) -> str:
    """What was meant by a folder that is no model."""
    if (folder / "recipe.yaml").is_file():
        models = [folder / "models" / name for name in ("final", *(f"iteration-{i}" for i in range(9, 0, -1)))]
        found = next((model for model in models if (model / "config.json").is_file()), None)
        advice = (
            f"did you mean '{found}'?" if found else "it has no model yet: let it reach the end of an encoder phase"
        )
        return f"{folder}: a run folder, not a model folder; {advice}"
    if folder.is_file():
        return f"{folder}: a file; give a model folder first, such as runs/NAME/models/final, then the files"
    return f"{folder}: no config.json there; give a model folder, such as runs/NAME/models/final"


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
