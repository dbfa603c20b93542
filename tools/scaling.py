"""Weak scaling to many GPUs, computed: from a step's operations, the bytes that ZeRO sends, and stated link rates.

    python tools/scaling.py [--recipe audio] [--micro-batch 16 64] [--gpus 1 8 64 256 1024] [--mfu 0.4] ...

Prints, for each phase and micro-batch, the step without and with others, and the share of one GPU's clips/s that each
of N keeps. Every assumption is an argument; docs/scaling.md says where the defaults come from.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from bridle.config import EncoderPhase, JointPhase, Recipe, load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components, parameter_count
from bridle.training.flops import ClipFlops

BACKWARD = 2 / 3
"""Share of the trained half's operations that are the backward pass's."""


@dataclass(frozen=True)
class Cluster:
    """peak: FLOP/s of a GPU. mfu: share of it that a step reaches alone. local, remote: bytes/s that a GPU sends to
    its node and to others. reached: share of these rates that collectives reach. hop: seconds from a rank to the next,
    within a node and between nodes. jitter: deviation of a step's time over ranks, as a share of it. bucket: numbers in
    a collective (ds_configs/ have 50e6)."""

    per_node: int = 8
    peak: float = 989e12
    mfu: float = 0.4
    local: float = 450e9
    remote: float = 50e9
    reached: float = 0.8
    local_hop: float = 1e-6
    remote_hop: float = 5e-6
    jitter: float = 0.005
    bucket: float = 50e6


def collective(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter or all-gather of `size` bytes, as rings in which each GPU has its own network card:
    every GPU sends (n - 1) / n of the bytes in n - 1 hops."""
    nodes = math.ceil(gpus / cluster.per_node)
    rate = cluster.local if nodes == 1 else min(cluster.local, cluster.per_node * cluster.remote)
    buckets = max(1, math.ceil(size / 2 / cluster.bucket))
    hops = (gpus - nodes) * cluster.local_hop + (nodes if nodes > 1 else 0) * cluster.remote_hop
    return size * (gpus - 1) / gpus / (rate * cluster.reached) + buckets * hops


def exposed(parameters: float, stage: int, gpus: int, step: float, codebook_bytes: float, cluster: Cluster) -> float:
    """Seconds that a step waits for others: gradients hide behind the backward pass, and with stage 3 weights behind
    forward and backward pass, as far as these are long enough; the rest does not.

    Bytes a parameter in bfloat16: stages 1 and 2 scatter 2 and gather 2, after the optimizer; stage 3 scatters 2 and
    gathers 2 twice. Codebooks' sums are reduced once, in float32.
    """
    if gpus == 1:
        return 0.0
    once = collective(2 * parameters, gpus, cluster)
    books = 2 * collective(codebook_bytes, gpus, cluster)
    behind_backward = BACKWARD * step
    if stage == 3:
        return max(0.0, once - (step - behind_backward)) + max(0.0, 2 * once - behind_backward) + books
    return max(0.0, once - behind_backward) + once + books


def slowest(gpus: int, jitter: float) -> float:
    """Mean of the largest of n normal deviates, about sqrt(2 ln n), times the jitter: each step ends with its last."""
    return jitter * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0


def trained(recipe: Recipe, make: Components, index: int) -> float:
    """Parameters that a phase sends."""
    phase = recipe.phases[index]
    student = parameter_count(make.encoder(0)) + parameter_count(make.decoder(0))
    learner = parameter_count(make.tokenizer(0)) + parameter_count(make.estimator(0))
    if isinstance(phase, JointPhase):
        return student + learner
    return student if isinstance(phase, EncoderPhase) else learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Cluster()
    parser.add_argument("--recipe", default="audio")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--stage", type=int, nargs="+", default=[2, 3], choices=[1, 2, 3])
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    cluster = Cluster(**{name: getattr(args, name) for name in vars(defaults)})
    recipe = load_recipe(args.recipe)
    modality = build_modality(recipe.modality, {k: v for k, v in recipe.clip.items() if v != "auto"})
    patch, quantizer = patch_shape(modality), recipe.model.quantizer
    make, flops = Components(recipe.model, patch), ClipFlops(recipe, patch, tuple(modality.grid.values()))
    books = 4.0 * quantizer.codebooks * quantizer.codebook_size * (quantizer.dim + 1)
    print(f"{args.recipe}: {cluster}")
    print("phase        ZeRO  batch  alone, ms  MB sent  " + "  ".join(f"{n:>6}" for n in args.gpus) + "  GPUs")
    for index in [i for i, phase in enumerate(recipe.phases) if phase.kind != "cold_start"]:
        parameters = trained(recipe, make, index)
        for stage in args.stage:
            for micro in args.micro_batch:
                step = micro * flops.of_phase(index) / (cluster.peak * cluster.mfu)
                kept = [
                    step / ((step + exposed(parameters, stage, n, step, books, cluster))
                            * (1 + slowest(n, cluster.jitter)))
                    for n in args.gpus
                ]  # fmt: skip
                sent = (6 if stage == 3 else 4) * parameters / 1e6
                name = f"{index} {recipe.phases[index].kind}"
                print(
                    f"{name:<12} {stage:>4}  {micro:>5}  {1e3 * step:>9.1f}  {sent:>7.0f}  "
                    + "  ".join(f"{share:>6.3f}" for share in kept)
                )


if __name__ == "__main__":
    main()
