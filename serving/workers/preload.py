"""Imported once by the process that all others are forked from, so that a new one starts in milliseconds."""

from __future__ import annotations

import contextlib
import importlib

import PIL.PngImagePlugin  # noqa: F401
import torch  # noqa: F401
from matplotlib import colormaps  # noqa: F401  (the playground's spectrograms)

import bridle.model_folder  # noqa: F401
from bridle.modalities import REGISTRY

for _place in REGISTRY.values():
    with contextlib.suppress(ImportError):  # a modality whose decoder is not installed can't be served, others can
        importlib.import_module(_place.partition(":")[0])
