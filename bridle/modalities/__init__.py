"""Two files per modality: what its clips are, and how bytes become them. Nothing here knows where bytes came from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

from bridle.modalities.clip import Description, Limits, Modality
from bridle.settings import RecipeError, nearest, parse_settings

REGISTRY = {
    "audio": "bridle.modalities.audio:Audio",
    "image": "bridle.modalities.image:Image",
    "video": "bridle.modalities.video:Video",
}
"""A modality's name, and where it stands. Imported on use, so that a decoder is only needed by those who use it."""
DESCRIPTIONS = {
    "audio": "bridle.modalities.audio_description:AudioDescription",
    "image": "bridle.modalities.image_description:ImageDescription",
    "video": "bridle.modalities.video_description:VideoDescription",
}
"""The same for what is known of a modality without its decoder and without torch."""


def modality_class(name: str) -> type[Modality]:
    """The class registered under `name`.

    Raises:
        RecipeError: no such modality.
    """
    return cast(type[Modality], _found(name, REGISTRY))


def build_modality(name: str, settings: Mapping[str, Any], limits: Limits | None = None, raw: bool = False) -> Modality:
    """A modality with checked settings (a recipe's `clip` section); raw: see `Modality`.

    Raises:
        RecipeError: no such modality, an unknown key, a wrong value.
    """
    cls = modality_class(name)
    parsed = parse_settings(cls.settings_class, settings, f"clip settings of modality {name}")
    return cls(parsed, limits or Limits(), raw)  # type: ignore[call-arg]


def describe(name: str, settings: Mapping[str, Any], limits: Limits | None = None) -> Description:
    """What a modality with these settings makes of files; neither its decoder nor torch is imported.

    Raises:
        RecipeError: as `build_modality`.
    """
    cls = cast(type[Description], _found(name, DESCRIPTIONS))
    parsed = parse_settings(cls.settings_class, settings, f"clip settings of modality {name}")
    return cls(parsed, limits or Limits())  # type: ignore[call-arg]


def _found(name: str, places: Mapping[str, str]) -> object:
    if name not in places:
        raise RecipeError(f"modality '{name}' is unknown{nearest(name, places)}")
    module, _, attribute = places[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
