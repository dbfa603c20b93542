"""What `config.json` of model and classifier folders says: read and checked without torch, so in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bridle.config import EncoderSettings, QuantizerSettings
from bridle.errors import MistakeError
from bridle.files import read_json
from bridle.settings import RecipeError, Settings, parse_settings

FORMAT = 1
"""Version of the layout of a model folder, and of a classifier folder; a folder of another version is refused."""
CLASSIFIER = "bridle-classifier"
"""What config.json of a classifier folder says of itself (`bridle.classifier`)."""


class ModelError(MistakeError):
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
    model_type: Literal["bridle"] = "bridle"
    """What `transformers` knows it by."""
    licence: str | None = None
    """Of the weights, as the hub writes it, e.g. `cc-by-4.0`."""
    trained: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: recipe, phase, clips seen. Informative."""


class ClassifierConfig(Settings):
    """What `config.json` holds."""

    format: int
    """Version of the layout."""
    bridle: str
    """Version of the package that wrote it."""
    name: str
    """Name of the classifier, for people and for `model=`."""
    modality: str
    """Name in the registry of modalities."""
    clip: dict[str, Any]
    """The modality's settings."""
    encoder: EncoderSettings
    classes: list[str]
    """Names, in the order of the head's rows."""
    loss: Literal["bce", "ce"]
    """`bce`: a probability of each class by itself; `ce`: shares that add up to 1."""
    model_type: Literal["bridle-classifier"] = "bridle-classifier"
    licence: str | None = None
    """Of the weights, as the hub writes it, e.g. `cc-by-4.0`."""
    trained: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: the model that it began with, steps, data. Informative."""


def read_config(folder: Path) -> ModelConfig:
    """Reads and checks `config.json`.

    Raises:
        ModelError: see `load`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(_no_model(folder))
    raw = read_json(path)
    if isinstance(raw, dict) and raw.get("model_type") == CLASSIFIER:
        raise ModelError(
            f"{folder}: a classifier folder, which has no codes; use it with `bridle classify {folder} FILE`"
        )
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


def is_classifier(folder: Path) -> bool:
    """Whether a folder says that it is a classifier's."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    raw = read_json(path)
    return isinstance(raw, dict) and raw.get("model_type") == CLASSIFIER


def read_classifier_config(folder: Path) -> ClassifierConfig:
    """Reads and checks `config.json`.

    Raises:
        ModelError: see `load_classifier`.
    """
    path = folder / "config.json"
    if not path.is_file():
        inside = folder / "classifier"
        hint = f"did you mean '{inside}'?" if (inside / "config.json").is_file() else "give RUN/classifier"
        raise ModelError(f"{folder}: no config.json there; {hint}")
    raw = read_json(path)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != CLASSIFIER:
        raise ModelError(f"{folder}: a model without classes; `bridle finetune {folder} SHARDS` makes a classifier")
    if raw.get("format") != FORMAT:
        raise ModelError(f"{path}: format {raw.get('format')!r}, expected {FORMAT}; use the bridle that wrote it")
    try:
        return parse_settings(ClassifierConfig, raw, str(path))
    except RecipeError as error:
        raise ModelError(str(error)) from None
