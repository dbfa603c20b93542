"""Packs the demo models that ship inside the package: ``python tools/demo_models.py RUN [RUN ...]``.

RUN is a finished run of a mini recipe on the built-in sample, one of each modality (``make demo-models`` trains them).
Its newest model becomes ``bridle/builtin/MODALITY``: weights in float16, codebooks in float32, and a card that says
what the model is not. Prints how many codes of the held-out sample the rounding changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bridle.data.shards import open_shards
from bridle.evaluation.codebooks import Windows
from bridle.model import BridleModel, batched
from bridle.model_folder import load, save_model

TARGET = Path(__file__).parents[1] / "bridle" / "builtin"
LARGEST = 3_000_000
"""Bytes of a model's weights."""
NOTE = (
    "It is a demonstration that first codes can be had from the package alone, and a fixture for tests. It is **not** a"
    " model to build on: it has seen a hundred to a few hundred small files for some minutes, knows nothing of speech,"
    " music or scenes at large, and no figure of it says anything of the method. Train your own on your own data."
)


def main(runs: list[str]) -> int:
    for run in runs:
        model = load(Path(run) / "models" / "final")
        config = model.config
        folder = TARGET / config.modality
        weights = {part: _rounded(getattr(model, part).state_dict()) for part in ("encoder", "tokenizer")}
        save_model(
            folder,
            name=f"{config.modality}-demo",
            modality=config.modality,
            clip=config.clip,
            encoder_settings=config.encoder,
            quantizer_settings=config.quantizer,
            learned=config.tokenizer == "learned",
            trained={key: value for key, value in config.trained.items() if key != "run"} | {"note": NOTE},
            licence="apache-2.0",
            **weights,
        )
        size = (folder / "model.safetensors").stat().st_size
        if size > LARGEST:
            raise SystemExit(f"{folder}: {size} bytes, above {LARGEST}")
        shares = ", ".join(f"{share:.4f}" for share in _changed(model, load(folder)))
        print(f"{folder}: {size} bytes; codes that the rounding changes, by codebook: {shares}")
    return 0


def _rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value if name.startswith("quantizer.") or not value.is_floating_point() else value.half()
        for name, value in weights.items()
    }


def _changed(before: BridleModel, after: BridleModel) -> list[float]:
    """Share of each codebook's codes that differ, over the held-out sample."""
    shards = open_shards([f"builtin:{before.config.modality}-heldout"], extensions=before.modality.extensions)
    counts: list[torch.Tensor] = []
    for batch in batched(Windows(shards, before.modality), 16):
        windows = [item for item in batch if hasattr(item, "values")]
        values, valid = torch.stack([item.values for item in windows]), [item.positions for item in windows]
        pairs = zip(windows, before.codes(values, valid), after.codes(values, valid), strict=True)
        counts += [(a != b)[: item.positions] for item, a, b in pairs]
    return torch.cat(counts).double().mean(0).tolist()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
