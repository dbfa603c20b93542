"""What a recipe asks of a cluster's shard store, disks and network, computed from the model's own sizes.

python tools/cluster_needs.py audio --nodes 8 --gpus 8 --clips 2000000 --clip-kb 320 --tflops 120
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from bridle.config import EncoderPhase, load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components, parameter_count

WEIGHT_AND_MOMENTS = 12
"""Bytes a parameter in a checkpoint: float32, and Adam's two moments."""
GRADIENT = 2
"""Bytes a parameter that ZeRO sends in bfloat16: as a gradient, and again as a weight."""


@dataclass(frozen=True)
class Needs:
    """Of one recipe on one cluster; the phase that asks most of each."""

    parameters: float
    """Trained at once."""
    flop_per_clip: float
    step_seconds: float
    clips_per_second: float
    node_bytes_per_second: float
    dataset_bytes: float
    epoch_seconds: float
    node_network_bytes_per_step: float
    node_network_bits_per_second: float
    checkpoint_bytes: float


def needs(recipe_name: str, nodes: int, gpus: int, clips: float, clip_bytes: float, flops: float) -> Needs:
    """From counts, and what one GPU is assumed to sustain, in FLOP a second.

    6 FLOP a parameter and token forward and backward, 2 forward alone (Kaplan et al., "Scaling Laws for Neural Language
    Models", section 2.1; attention's own part is left out). An encoder phase runs the encoder on the visible patches,
    the decoder on all, and the frozen tokenizer forward on all; a tokenizer phase the tokenizer and estimator, and the
    frozen encoder forward, on all. A ring passes 2 (n - 1) / n times the gradients over each node's links.
    """
    recipe = load_recipe(recipe_name, [])
    modality = build_modality(recipe.modality, recipe.clip)
    make = Components(recipe.model, patch_shape(modality))
    sizes = {
        "encoder": parameter_count(make.encoder(0)),
        "decoder": parameter_count(make.decoder(0)),
        "tokenizer": parameter_count(make.tokenizer(0)),
        "estimator": parameter_count(make.estimator(0)),
    }
    tokens = math.prod(modality.grid.values())
    visible = tokens * (1 - recipe.mask.ratio)
    assert any(isinstance(phase, EncoderPhase) for phase in recipe.phases)
    phases = [
        (
            sizes["encoder"] + sizes["decoder"],
            6 * (sizes["encoder"] * visible + sizes["decoder"] * tokens) + 2 * sizes["tokenizer"] * tokens,
        ),
        (
            sizes["tokenizer"] + sizes["estimator"],
            6 * (sizes["tokenizer"] + sizes["estimator"]) * tokens + 2 * sizes["encoder"] * tokens,
        ),
    ]
    fewest = min(flop for _, flop in phases)  # the fastest phase asks most of store and network
    parameters = max(count for count, _ in phases)
    step = recipe.train.batch_size * fewest / (nodes * gpus * flops)
    per_step = 2 * (nodes - 1) / nodes * parameters * GRADIENT
    rate = recipe.train.batch_size / step
    return Needs(
        parameters=parameters,
        flop_per_clip=fewest,
        step_seconds=step,
        clips_per_second=rate,
        node_bytes_per_second=rate * clip_bytes / nodes,
        dataset_bytes=clips * clip_bytes,
        epoch_seconds=clips / rate,
        node_network_bytes_per_step=per_step,
        node_network_bits_per_second=8 * per_step / step,
        checkpoint_bytes=parameters * WEIGHT_AND_MOMENTS,
    )


def described(found: Needs, nodes: int) -> list[str]:
    """Rows of a Markdown table."""
    rows = {
        "parameters trained at once": f"{found.parameters / 1e6:.0f} M",
        "arithmetic a clip": f"{found.flop_per_clip / 1e9:.0f} GFLOP",
        "a step, if nothing waits": f"{found.step_seconds * 1e3:.0f} ms",
        "clips, all nodes": f"{found.clips_per_second:,.0f}/s",
        "an epoch": f"{found.epoch_seconds:.0f} s",
        "read from a node's disk": f"{found.node_bytes_per_second / 1e6:,.0f} MB/s",
        "data set, and so each node's cache": f"{found.dataset_bytes / 1e9:,.0f} GB",
        "fetched from the store, once": f"{found.dataset_bytes * nodes / 1e12:.1f} TB",
        "gradients and weights through a node's links": f"{found.node_network_bytes_per_step / 1e9:.2f} GB a step,"
        f" {found.node_network_bits_per_second / 1e9:.0f} Gbit/s",
        "a checkpoint": f"{found.checkpoint_bytes / 1e9:.2f} GB",
    }
    return [f"| {name} | {value} |" for name, value in rows.items()]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("recipe", help="audio, image, video, or a file")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="of a node (8)")
    parser.add_argument("--clips", type=float, required=True, help="samples in the data set")
    parser.add_argument("--clip-kb", type=float, required=True, help="10^3 bytes of one in its shard")
    parser.add_argument("--tflops", type=float, required=True, help="10^12 FLOP/s that a GPU sustains on this model")
    args = parser.parse_args()
    found = needs(args.recipe, args.nodes, args.gpus, args.clips, args.clip_kb * 1e3, args.tflops * 1e12)
    print("\n".join(described(found, args.nodes)))


if __name__ == "__main__":
    main()
