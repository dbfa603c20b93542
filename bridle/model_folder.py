"""The model folder: the only thing that leaves training, and all that serving, evaluation and users need.

``config.json`` says what the model is, ``model.safetensors`` holds encoder and tokenizer, ``README.md`` is its card.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle import __version__
from bridle.config import EncoderSettings, QuantizerSettings
from bridle.files import sha256, whole_folder
from bridle.folder_config import FORMAT, ModelConfig, ModelError, read_config
from bridle.hub import local_folder, publish
from bridle.modalities import build_modality
from bridle.modalities.clip import Limits, Modality
from bridle.model import BridleModel, CodeStream, stacked
from bridle.model_card import model_card
from bridle.modeling.encoder import Encoder
from bridle.modeling.patches import PatchShape
from bridle.modeling.tokenizer import ColdStartTokenizer, LearnedTokenizer, Tokenizer

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PublishableModel(BridleModel):
    """A model as `load` gives it: with the ways out to another folder and to the Hugging Face hub."""

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None) -> None:
        """Writes the model folder, whole, with a fresh card; licence: of the weights, unless the model has one.

        Raises:
            ModelError: loaded in another dtype than float32, which would be less than what was loaded.
            OSError: it cannot be written.
        """
        config = self.config
        if self.encoder.embed.weight.dtype != torch.float32:
            raise ModelError(f"{config.name}: loaded in {self.encoder.embed.weight.dtype}; load it in float32")
        save_model(
            Path(folder),
            name=config.name,
            modality=config.modality,
            clip=config.clip,
            encoder_settings=config.encoder,
            quantizer_settings=config.quantizer,
            encoder=self.encoder.state_dict(),
            tokenizer=self.tokenizer.state_dict(),
            learned=config.tokenizer == "learned",
            trained=config.trained,
            licence=licence or config.licence,
        )

    def push_to_hub(self, repo: str, *, licence: str | None = None, **options: Any) -> str:
        """Publishes the model folder as ``owner/name`` of the Hugging Face hub; makes the repository if need be.

        licence: see `save_pretrained`; options: `private`, `token`, `branch`, `message` of `bridle.hub.publish`.

        Returns:
            The commit, to be given as `revision`.

        Raises:
            ModelError: see `save_pretrained`.
            HubError: not allowed, or the hub cannot be reached.
        """
        with tempfile.TemporaryDirectory(prefix="bridle-") as aside:
            self.save_pretrained(Path(aside) / "model", licence=licence)
            return publish(Path(aside) / "model", repo, **options)


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
    licence: str | None = None,
) -> None:
    """Writes a model folder, whole or not at all.

    encoder, tokenizer: state dicts; learned: whether the tokenizer is `LearnedTokenizer`'s (else the cold start's).
    trained: see `model_card`; a probe of other weights is left out.
    """
    trained = dict(trained)
    weights = {f"encoder.{key}": value for key, value in encoder.items()}
    weights |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    with whole_folder(folder) as aside:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()}, aside / "model.safetensors"
        )
        if (trained.get("probe") or {}).get("sha256") != sha256(aside / "model.safetensors"):
            trained.pop("probe", None)
        config = ModelConfig(
            format=FORMAT,
            bridle=__version__,
            name=name,
            modality=modality,
            clip=dict(clip),
            tokenizer="learned" if learned else "cold_start",
            encoder=encoder_settings,
            quantizer=quantizer_settings,
            licence=licence,
            trained=trained,
        )
        (aside / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card(config.model_dump(mode="json")), encoding="utf-8")


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    limits: Limits | None = None,
    revision: str | None = None,
) -> PublishableModel:
    """Loads a model folder, one of the Hugging Face hub by ``owner/name``, or one that ships: ``builtin:audio``.

    device: where to put it; dtype: `float32` or `bfloat16` (the quantizer stays in float32); limits: bounds on what a
    file may unfold to; revision: of a hub's repository, best a commit.

    Raises:
        HubError: the hub does not have it, or cannot be reached.
        ModelError: no such folder, not a model, another format version, damaged or missing weights.
    """
    folder = local_folder(folder, revision)
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
    return PublishableModel(config, modality, encoder, tokenizer, sha256(weights_file))


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
