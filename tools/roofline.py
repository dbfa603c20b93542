"""What a GPU would reach at most: every operation of a step bound by products or by memory, and by its launch.

    python tools/roofline.py [--recipe audio] [--micro-batch 16] [--precision bf16|fp32] [--rate 989e12]
                             [--bandwidth 3.35e12] [--launch 5e-6]

Runs each phase's forward and backward pass and AdamW on tensors without content, operation by operation as eager torch
would, and adds up max(FLOP / rate, bytes / bandwidth, launch): bytes are those of an operation's arguments and results.
Prints the share of the rate that the phase's own FLOP (see bridle/training/flops.py) would reach in that time, and in
the time without the launches, which is what a compiled graph could approach without fusing anything. With the rate and
bandwidth of a CPU and no launch cost, it is what docs/performance.md holds against a measured step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from memory_table import batch, jobs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bridle.config import load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components
from bridle.training.flops import ClipFlops
from bridle.training.phases import PhaseJob

MOVES_NOTHING = (torch.ops.aten.detach, torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like)
STATE = 28
"""Bytes that AdamW reads and writes a parameter: weight, gradient and two moments in float32, all but the gradient
back."""


@dataclass(eq=False)
class Bounds(TorchDispatchMode):
    """Adds up the bounds of all operations that pass."""

    rate: float
    bandwidth: float
    launch: float
    seconds: float = 0.0
    unlaunched: float = 0.0
    operations: int = 0
    by_memory: float = 0.0
    largest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.overloadpacket not in MOVES_NOTHING:
            self.add(func, args, kwargs or {}, out)
        return out

    def add(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        packet = func.overloadpacket
        counted = flop_registry.get(packet)
        flops = attention(func, args) if counted is None else counted(*args, **kwargs, out_val=out)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        products, memory = flops / self.rate, sum(leaf.nbytes for leaf in tensors) / self.bandwidth
        bound = max(products, memory)
        self.operations += 1
        self.unlaunched += bound
        self.seconds += max(bound, self.launch)
        self.by_memory += bound if memory > products else 0.0
        self.largest[str(packet)] = self.largest.get(str(packet), 0.0) + bound


def attention(func: Any, args: Sequence[Any]) -> float:
    """FLOP of a CPU's fused attention, which the registry lacks: two products forwards, five backwards (one of them
    again)."""
    name = str(func)
    if "scaled_dot_product_flash_attention_for_cpu" not in name:
        return 0.0
    backward = "backward" in name
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    one = 2.0 * query.numel() * key.shape[-2]
    return (5 if backward else 2) * one


def step(job: PhaseJob, clips: dict[str, torch.Tensor], bf16: bool, bounds: Bounds) -> None:
    with bounds, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, *_ = job.module(*job.inputs(clips))
        loss.backward()
    parameters = sum(weight.numel() for weight in job.module.parameters() if weight.requires_grad)
    update = STATE * parameters / bounds.bandwidth
    bounds.seconds += update
    bounds.unlaunched += update
    bounds.by_memory += update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="audio")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rate", type=float, default=989e12, help="FLOP/s of products")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes/s of memory")
    parser.add_argument("--launch", type=float, default=5e-6, help="seconds that an operation takes at least")
    args = parser.parse_args()
    bf16, recipe = args.precision == "bf16", load_recipe(args.recipe)
    modality = build_modality(recipe.modality, {k: v for k, v in recipe.clip.items() if v != "auto"})
    patch, grid = patch_shape(modality), tuple(modality.grid.values())
    flops = ClipFlops(recipe, patch, grid)
    ours = {"encoder": flops.student() + flops.tokenizer_codes(), "tokenizer": flops.of_phase(2)}
    print(f"{args.recipe}, {args.precision}, micro-batch {args.micro_batch}, {vars(args)}")
    print("phase       GFLOP a clip  operations  step, ms  share of rate  without launches  bound by memory")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, job in jobs(recipe, Components(recipe.model, patch), bf16).items():
            bounds = Bounds(args.rate, args.bandwidth, args.launch)
            step(job, batch(recipe, patch, grid, args.micro_batch), bf16, bounds)
            least = ours[name] * args.micro_batch / args.rate
            print(
                f"{name:<10} {ours[name] / 1e9:>13.1f} {bounds.operations:>11} {1e3 * bounds.seconds:>9.2f}"
                f" {least / bounds.seconds:>14.2f} {least / bounds.unlaunched:>17.2f}"
                f" {bounds.by_memory / bounds.unlaunched:>16.2f}"
            )
            ranked = sorted(bounds.largest.items(), key=lambda item: -item[1])[:6]
            print("           " + ", ".join(f"{what} {spent / bounds.unlaunched:.2f}" for what, spent in ranked))


if __name__ == "__main__":
    main()
