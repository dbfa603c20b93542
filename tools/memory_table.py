"""Memory of a GPU in training, for each size of model: computed with FakeTensor, where nothing is allocated.

    python tools/memory_table.py [--recipe audio] [--micro-batch 16] [--gpus 64] [--sizes tiny small base large billion]

Weights, gradients and moments are counted from the model's parameters and what each ZeRO stage keeps of them with
bfloat16; activations are the most that a forward and backward pass of the phase holds at once, as torch's MemTracker
sees it, on tensors that have shapes and no content. What CUDA, nccl, buckets and fragmentation take comes on top.
"""

from __future__ import annotations

import argparse
import math
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from bridle.config import SIZES, Recipe, load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components, parameter_count
from bridle.modeling.masking import hidden_count
from bridle.modeling.patches import PatchShape
from bridle.training.phases import EncoderPhaseJob, PhaseJob, TokenizerPhaseJob

BILLION: dict[str, Any] = {
    "encoder": {"width": 1792, "depth": 26, "heads": 28},
    "decoder": {"width": 512, "depth": 16, "heads": 16},
    "estimator": {"depth": 3},
}
"""An encoder of a billion parameters, with the decoder of the size large."""


def sized(recipe: Recipe, size: str) -> Recipe:
    parts: dict[str, Any] = BILLION if size == "billion" else SIZES[size]
    model = recipe.model.model_dump()
    for part, values in parts.items():
        model[part].update(values)
    return recipe.model_validate(recipe.model_dump() | {"model": model})


def jobs(recipe: Recipe, make: Components, bf16: bool = True) -> dict[str, PhaseJob]:
    """The phases of a pair: an encoder that learns from a learned tokenizer, and a tokenizer."""
    quantizer, device = recipe.model.quantizer, torch.device("cpu")
    teacher, learner = make.tokenizer(0), make.tokenizer(0)
    for tokenizer in (teacher, learner):
        tokenizer.quantizer._known_initialized = True  # it has no content that could say so
    with mock.patch.object(torch.nn.Module, "to", lambda self, *_: self):  # which fake weights do not survive
        return {
            "encoder": EncoderPhaseJob(make.encoder(0), make.decoder(0), teacher, quantizer, device, bf16),
            "tokenizer": TokenizerPhaseJob(learner, make.estimator(0), make.encoder(0), quantizer, device, bf16),
        }


def batch(recipe: Recipe, patch: PatchShape, grid: tuple[int, ...], micro: int) -> dict[str, torch.Tensor]:
    """A micro-batch without content."""
    hidden, size = hidden_count(recipe.mask, grid), [n * side for n, side in zip(grid, patch.size, strict=True)]
    return {
        "values": torch.empty(micro, patch.channels, *size),
        "visible": torch.zeros(micro, math.prod(grid) - hidden, dtype=torch.int64),
        "masked": torch.zeros(micro, hidden, dtype=torch.int64),
    }


def activations(job: PhaseJob, clips: dict[str, torch.Tensor]) -> int:
    """Bytes held at the peak of a forward and backward pass, but for weights, buffers and gradients."""
    tracker = MemTracker()
    tracker.track_external(job.module)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = job.inputs(clips)
        with tracker:
            loss, *_ = job.module(*inputs)
            loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    states = [size for kind, size in peak.items() if str(kind).rpartition(".")[2] in ("PARAM", "BUFFER", "GRAD")]
    return int(peak["Total"] - sum(states))


def states(trained: int, frozen: int, stage: int, gpus: int) -> float:
    """Bytes of weights, gradients and moments on each GPU: bfloat16 weights and gradients, which stage 2 and 3 share
    out, and 12 bytes a parameter of float32 weights and moments, which every stage shares out; frozen weights stay."""
    weights = 2 * trained / (gpus if stage == 3 else 1)
    gradients = 2 * trained / (gpus if stage >= 2 else 1)
    return weights + gradients + 12 * trained / gpus + 2 * frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="audio")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES, "billion"])
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    modality = build_modality(recipe.modality, {k: v for k, v in recipe.clip.items() if v != "auto"})
    patch, grid = patch_shape(modality), tuple(modality.grid.values())
    print(f"{args.recipe}, bfloat16, micro-batch {args.micro_batch}, {args.gpus} GPUs; GiB a GPU")
    print("size     phase      trained, M  frozen, M  activations  ZeRO-1  ZeRO-2  ZeRO-3")
    for size in args.sizes:
        resized = sized(recipe, size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for name, job in jobs(resized, Components(resized.model, patch)).items():
                trained = parameter_count(job.module)
                frozen = sum(weight.numel() for weight in frozen_half(job).parameters())
                held = activations(job, batch(resized, patch, grid, args.micro_batch))
                sums = [(held + states(trained, frozen, stage, args.gpus)) / 2**30 for stage in (1, 2, 3)]
                print(
                    f"{size:<8} {name:<10} {trained / 1e6:>10.1f} {frozen / 1e6:>10.1f} {held / 2**30:>12.2f}"
                    f"  {'  '.join(f'{total:>6.2f}' for total in sums)}",
                    flush=True,
                )


def frozen_half(job: PhaseJob) -> torch.nn.Module:
    half = job.tokenizer if isinstance(job, EncoderPhaseJob) else job.encoder  # type: ignore[attr-defined]
    assert isinstance(half, torch.nn.Module)
    return half


if __name__ == "__main__":
    main()
