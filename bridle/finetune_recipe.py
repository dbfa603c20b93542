"""The typed recipe of fine-tuning: a model folder's encoder, and a head, learn labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bridle.config import SIZES, EncoderSettings, MaskSettings, Positive, RunSettings, TrainedPhase
from bridle.recipe_files import read_recipe_file
from bridle.settings import RecipeError, Settings, nearest, parse_settings

Share = Annotated[float, Field(ge=0, le=1)]
BELOW = "finetune"
"""Folder of the recipes that ship."""


class MixupSettings(Settings):
    """Clips that are mixed with another one (Zhang et al. 2018): values and labels, l and 1 - l of each."""

    share: Share = 0.0
    """Share of the training clips that are mixed."""
    alpha: Annotated[float, Field(gt=0)] = 0.8
    """l is drawn from beta(alpha, alpha)."""


class FinetunePhase(TrainedPhase):
    """Encoder and head learn labels."""

    kind: Literal["finetune"] = "finetune"
    loss: Literal["bce", "ce"] = "ce"
    """Binary cross-entropy of each class by itself (several labels a file, or one), or cross-entropy (one label)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label that is spread evenly over all classes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Each block's learning rate against that of the block behind it; the head's is `lr`."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which a training clip leaves out the last block's branches; it grows linearly from the first."""
    mask: MaskSettings | None = None
    """What is hidden of a training clip; none: nothing. `time_frequency` hides whole rows and columns."""
    mixup: MixupSettings = MixupSettings()
    weighted: bool = False
    """Draw training files with weights, so that rare classes come as often as frequent ones."""


class ViewSettings(Settings):
    """Clips of a held-out file whose probabilities are averaged. Sound and pictures: all windows."""

    clips: Positive = 1
    """Video: evenly spaced clips of each file."""
    crops: Literal[1, 3] = 1
    """Video: the centre, or both ends of the longer side too."""


class StartSettings(Settings):
    """The model folder that a run begins with, as it was then."""

    name: str
    sha256: str
    scratch: bool = False
    """Whether only its shape was taken: random weights, the control of what pretraining is worth."""


class FinetuneRecipe(RunSettings):
    """One fine-tuning run. `encoder` and what `clip` does not name come from the model folder."""

    labels: str = "json"
    """The member that holds a file's labels: an extension such as `cls`, or `json.FIELD`."""
    fold_of: str = "json.fold"
    """The member that holds a file's fold, where the data set has folds."""
    fold: str | None = None
    """Hold this fold out, train on the others."""
    encoder: EncoderSettings | None = None
    """Of a run from scratch that takes no model folder's shape."""
    views: ViewSettings = ViewSettings()
    start: StartSettings | None = None
    """Filled in when a run begins."""
    phases: Annotated[list[FinetunePhase], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _heldout_once(self) -> FinetuneRecipe:
        if self.fold is not None and self.data.heldout:
            raise ValueError("give either fold or data.heldout; set the other one to null")
        return self

    @property
    def phase(self) -> FinetunePhase:
        """The one phase."""
        return self.phases[0]


def load_finetune_recipe(name: str, overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Reads a shipped recipe of fine-tuning by name or a YAML file by path, with ``dotted.key=value`` overrides.

    Raises:
        RecipeError: unknown recipe, unknown key, wrong value, malformed YAML or override.
    """
    raw = read_recipe_file(name, overrides, BELOW)
    encoder = raw.get("encoder")
    if isinstance(encoder, dict) and "size" in encoder:
        size = str(encoder["size"])
        if size not in SIZES:
            raise RecipeError(f"recipe {name}: encoder.size '{size}' is unknown{nearest('', SIZES)}")
        rest = {key: value for key, value in encoder.items() if key != "size"}
        raw["encoder"] = {**SIZES[size]["encoder"], **rest}
    return parse_settings(FinetuneRecipe, raw, f"recipe {name}")
