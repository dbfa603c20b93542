"""Achieved FLOP/s of each phase's step at the paper's audio configuration, over the machine's matrix-product rate.

    python benchmarks/train_step.py [--recipe audio] [--batch 2] [--rounds 5] [--precision fp32|bf16] [--threads N]

Both rates are measured in the same run, in turns, at the same precision and number of threads; the ratio is of medians.
A step is what training does: the frozen half, forward, backward, AdamW, and the codebooks' moving average. FLOPs are
counted by torch (matrix products, convolutions, attention), so that element-wise work counts as time but not as FLOPs.
The products that set the machine's rate are those of the encoder's blocks at the size at hand, in both directions, and
the best of them counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bridle.config import Recipe, load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components
from bridle.modeling.masking import draw_mask
from bridle.training.phases import EncoderPhaseJob, PhaseJob, TokenizerPhaseJob


def steps(recipe: Recipe, batch: int, bf16: bool, device: torch.device) -> dict[str, Callable[[], None]]:
    """One training step of each phase, ready to run again and again."""
    modality = build_modality(recipe.modality, recipe.clip)
    patch = patch_shape(modality)
    make, quantizer = Components(recipe.model, patch), recipe.model.quantizer
    size = [count * side for count, side in zip(modality.grid.values(), patch.size, strict=True)]
    values = torch.randn(batch, patch.channels, *size, device=device)
    rng = np.random.default_rng(0)
    masks = [draw_mask(recipe.mask, tuple(modality.grid.values()), rng) for _ in range(batch)]
    inputs = {
        "values": values,
        "masked": torch.stack([mask.nonzero().flatten() for mask in masks]).to(device),
        "visible": torch.stack([(~mask).nonzero().flatten() for mask in masks]).to(device),
    }
    latents = torch.randn(4096, quantizer.dim, generator=torch.Generator().manual_seed(0))
    cold, learner, target = make.cold_start_tokenizer(0), make.tokenizer(1), make.tokenizer(2)
    for tokenizer in (cold, learner, target):
        tokenizer.quantizer.initialize(latents, torch.Generator().manual_seed(0))
    jobs: dict[str, PhaseJob] = {
        "encoder, iteration 1": EncoderPhaseJob(make.encoder(3), make.decoder(4), cold, quantizer, device, bf16),
        "encoder, iteration 2": EncoderPhaseJob(make.encoder(3), make.decoder(4), target, quantizer, device, bf16),
        "tokenizer": TokenizerPhaseJob(learner, make.estimator(5), make.encoder(3), quantizer, device, bf16),
    }
    return {name: step_of(job, inputs, bf16) for name, job in jobs.items()}


def step_of(job: PhaseJob, inputs: dict[str, torch.Tensor], bf16: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in job.module.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
            loss, _, codes, *_ = job.module(*job.inputs(inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        job.after_step(None)
        job.count(codes)

    return step


def products(recipe: Recipe, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    """The matrix products of the encoder's feed-forward layer, forwards and for the weights' gradient."""
    width = recipe.model.encoder.width
    a = torch.randn(tokens, width, dtype=dtype, device=device)
    b = torch.randn(width, 4 * width, dtype=dtype, device=device)
    wide = torch.randn(tokens, 4 * width, dtype=dtype, device=device)
    square = torch.randn(2048, 2048, dtype=dtype, device=device)
    return {
        "forward": lambda: torch.mm(a, b),
        "weight gradient": lambda: torch.mm(a.T, wide),
        "2048 squared": lambda: torch.mm(square, square),
    }


def seconds(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="audio")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = args.precision == "bf16"
    recipe = load_recipe(args.recipe)
    modality = build_modality(recipe.modality, recipe.clip)
    tokens = args.batch * int(np.prod(list(modality.grid.values())))
    candidates = products(recipe, tokens, torch.bfloat16 if bf16 else torch.float32, device)
    product_flops = {name: flops(run) for name, run in candidates.items()}
    phases = steps(recipe, args.batch, bf16, device)
    phase_flops = {name: flops(run) for name, run in phases.items()}
    rates: dict[str, list[float]] = {name: [] for name in [*candidates, *phases]}
    for _ in range(args.rounds):
        for name, run in candidates.items():
            rates[name].append(product_flops[name] / seconds(run, device, times=10))
        for name, step in phases.items():
            rates[name].append(phase_flops[name] / seconds(step, device))
    best = max(statistics.median(rates[name]) for name in candidates)
    print(
        f"{args.recipe}, batch {args.batch}, {args.precision}, {device}, {args.threads} threads, {args.rounds} rounds"
    )
    for name in candidates:
        print(f"  product, {name:<16} {statistics.median(rates[name]) / best:6.2f} of the best product")
    for name in phases:
        ratio = statistics.median(rates[name]) / best
        print(
            f"  {name:<25} {phase_flops[name] / args.batch / 1e9:6.0f} GFLOP a clip  {ratio:5.2f} of the best product"
        )


if __name__ == "__main__":
    main()
