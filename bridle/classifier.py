"""The classifier folder: what fine-tuning leaves, and all that `bridle classify` and the service need.

``config.json`` says what it is and names its classes, ``model.safetensors`` holds encoder and head, ``README.md`` is
its card, ``heldout.json`` its figures on files that it never saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridle import __version__
from bridle.files import sha256, whole_folder
from bridle.folder_config import FORMAT, ClassifierConfig, ModelError, read_classifier_config
from bridle.hub import local_folder
from bridle.modalities import build_modality
from bridle.modalities.clip import Clip, Limits, Modality
from bridle.model import CLIPS_AT_ONCE, batched, content_positions, read_source, stacked
from bridle.model_folder import DTYPES, patch_shape
from bridle.modeling.classifier import ClassifierModule, probabilities


class Classifier:
    """A loaded classifier: files or tensors to probabilities of classes. Made by `load_classifier`."""

    def __init__(self, config: ClassifierConfig, modality: Modality, module: ClassifierModule, digest: str) -> None:
        self.config, self.modality, self.module, self.sha256 = config, modality, module, digest
        self.module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.head.weight.device

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the classifier is, as plain data."""
        return {
            "name": self.config.name,
            "modality": self.config.modality,
            "classes": self.config.classes,
            "loss": self.config.loss,
            "width": self.config.encoder.width,
            "grid": dict(self.modality.grid),
            "positions_per_second": self.modality.positions_per_second,
            "version": self.config.bridle,
            "sha256": self.sha256,
            "trained": self.config.trained,
        }

    @torch.inference_mode()
    def probabilities(self, values: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Normalised clips ``[B, C, *S]`` to float32 ``[B, classes]``, on the classifier's device.

        valid: positions of each clip that are content (`Clip.positions`); none: all.
        """
        placed = values.to(device=self.device, dtype=self.module.head.weight.dtype)
        content = content_positions(self.module.encoder, placed, valid)
        return probabilities(self.module(placed, valid=content), self.config.loss)

    def classify(self, source: bytes | str | Path) -> Tensor:
        """float32 ``[classes]`` of a whole file: the mean over its windows, each weighing as much as it has content.

        Raises:
            ClipError: the file cannot be decoded or is above a limit. OSError: it cannot be read.
        """
        return self.mean(self.modality.windows(read_source(source, self.modality.limits.max_bytes)))

    def mean(self, clips: Iterable[Clip]) -> Tensor:
        """float32 ``[classes]`` of clips of one file, see `classify`. Raises ClipError."""
        found: list[Tensor] = []
        content: list[int] = []
        for batch in batched(clips, CLIPS_AT_ONCE):
            values, positions = stacked(batch)
            found.append(self.probabilities(values, positions).cpu())
            content += positions
        return weighted_mean(torch.cat(found), content)


def weighted_mean(found: Tensor, content: Sequence[int]) -> Tensor:
    """float32 ``[n, C]`` of n windows to ``[C]``, by their positions of content."""
    weights = torch.tensor(content, dtype=torch.float64)
    return ((weights / weights.sum()) @ found.double()).float()


def save_classifier(
    folder: Path, config: ClassifierConfig, weights: Mapping[str, Tensor], heldout: Mapping[str, Any] | None
) -> None:
    """Writes a classifier folder, whole or not at all.

    weights: of `ClassifierModule`, by name; heldout: figures, as plain data; none where no files were held out.
    """
    with whole_folder(folder) as aside:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()}, aside / "model.safetensors"
        )
        (aside / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if heldout is not None:
            (aside / "heldout.json").write_text(json.dumps(heldout, indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_card(config, heldout), encoding="utf-8")


def load_classifier(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    limits: Limits | None = None,
    revision: str | None = None,
) -> Classifier:
    """Loads a classifier folder, or one of the Hugging Face hub by ``owner/name``; arguments as `bridle.load`'s.

    Raises:
        HubError: the hub does not have it, or cannot be reached.
        ModelError: no such folder, not a classifier, another format version, damaged or missing weights.
    """
    folder = local_folder(folder, revision)
    config = read_classifier_config(folder)
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
    modality = build_modality(config.modality, config.clip, limits)
    module = ClassifierModule(config.encoder, patch_shape(modality), len(config.classes))
    file = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(file), strict=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); run `bridle finetune` again, or fetch it again") from None
    except RuntimeError as error:
        raise ModelError(f"{file}: weights do not fit config.json beside it: {' '.join(str(error).split())}") from None
    module.to(device=device, dtype=DTYPES[dtype])
    return Classifier(config, modality, module, sha256(file))


def is_whole_classifier(folder: Path) -> bool:
    """Whether a classifier folder is there, readable and of this version; reads no weights."""
    try:
        read_classifier_config(folder)
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return bool(weights.keys())
    except (ValueError, OSError, SafetensorError):
        return False


def _card(config: ClassifierConfig, heldout: Mapping[str, Any] | None) -> str:
    trained = config.trained
    shown = ", ".join(f"`{name}`" for name in config.classes[:50]) + (", …" if len(config.classes) > 50 else "")
    head = ["---", "library_name: bridle", f"tags: [bridle, {config.modality}, {config.modality}-classification]"]
    head += [f"license: {config.licence}"] if config.licence else []
    lines = [
        "\n".join([*head, "---"]),
        f"# {config.name}",
        f"Tells {len(config.classes)} classes of {config.modality} apart: {shown}.",
        f"An encoder of width {config.encoder.width} and depth {config.encoder.depth} with a linear head, fine-tuned"
        f" with bridle {config.bridle} from {trained.get('start')} for {trained.get('steps')} steps on"
        f" {', '.join(f'`{name}`' for name in trained.get('data', []))}.",
        "```python\nfrom bridle.classifier import load_classifier\n\n"
        'classifier = load_classifier("path/to/this/folder")\n'
        'probabilities = classifier.classify("file")  # of classifier.config.classes, in this order\n```',
    ]
    if heldout is not None:
        rows = "\n".join(
            f"| {name.replace('_', ' ')} | {found['value']:.3f} | {found['interval'][0]:.3f} to"
            f" {found['interval'][1]:.3f} |"
            for name, found in heldout["figures"].items()
        )
        table = f"| figure | value | 95 % interval |\n| --- | --- | --- |\n{rows}"
        lines.append(f"## Held-out figures\n\nOf {heldout['files']} files.\n\n{table}")
    lines.append("## Licence\n\n" + (f"Weights: {config.licence}." if config.licence else "None was recorded."))
    return "\n\n".join(lines) + "\n"


def new_config(**fields: Any) -> ClassifierConfig:
    """A configuration of this version."""
    return ClassifierConfig(format=FORMAT, bridle=__version__, **fields)
