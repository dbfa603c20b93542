"""What padding costs a training step: batches without any, with a mask that hides nothing, and half padded.

    python benchmarks/padding.py [--recipe audio] [--batch 2] [--rounds 5] [--threads N]

Each is the encoder phase's step (frozen half, forward, backward) at the recipe's size, in turns, in one process; the
ratio is of medians to the batch without padding, whose attention gets no mask.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from bridle.config import load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components
from bridle.modeling.masking import draw_mask, hidden_count, split_positions
from bridle.training.phases import EncoderPhaseJob


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="audio")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe(args.recipe)
    modality = build_modality(recipe.modality, {k: v for k, v in recipe.clip.items() if v != "auto"})
    patch, grid = patch_shape(modality), tuple(modality.grid.values())
    make, quantizer = Components(recipe.model, patch), recipe.model.quantizer
    cold = make.cold_start_tokenizer(0)
    cold.quantizer.initialize(torch.randn(4096, quantizer.dim), torch.Generator().manual_seed(0))
    job = EncoderPhaseJob(make.encoder(1), make.decoder(2), cold, quantizer, device, bf16=device.type == "cuda")
    hidden = hidden_count(recipe.mask, grid)
    per_step, values = int(np.prod(grid[1:])), torch.randn(args.batch, patch.channels, *sides(grid, patch.size))

    def batch(steps: int, masked: bool) -> dict[str, torch.Tensor]:
        lists = [
            split_positions(draw_mask(recipe.mask, grid, np.random.default_rng(i), steps), steps * per_step, hidden)
            for i in range(args.batch)
        ]
        found = {
            "values": values,
            "visible": torch.stack([visible for visible, _ in lists]),
            "masked": torch.stack([hidden for _, hidden in lists]),
        }
        if masked:
            found["padding"] = torch.full((args.batch,), (grid[0] - steps) * per_step)
        return {name: tensor.to(device) for name, tensor in found.items()}

    batches = {
        "no padding": batch(grid[0], masked=False),
        "a mask that hides nothing": batch(grid[0], masked=True),
        "half padded": batch(grid[0] // 2, masked=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(args.rounds + 1):
        for name, found in batches.items():
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
                loss, *_ = job.module(*job.inputs(found))
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["no padding"])
    print(f"{args.recipe}, batch {args.batch}, {device}, {args.threads} threads, {args.rounds} rounds")
    for name, found in seconds.items():
        print(f"  {name:<26} {statistics.median(found) / base:5.2f} of the step without padding")


def sides(grid: tuple[int, ...], patch: tuple[int, ...]) -> list[int]:
    return [count * side for count, side in zip(grid, patch, strict=True)]


if __name__ == "__main__":
    main()
