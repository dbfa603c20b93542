"""Residual quantizer against vector-quantize-pytorch's ResidualVQ: lookup plus EMA in one process, rounds rotated.

    python benchmarks/quantizer.py [--rounds 9] [--threads 1]

Both run a training step's work at M=4, K=256, d=256 on the same 16,384 unit vectors: lookup in all stages, commitment
loss, EMA update of every codebook. ResidualVQ is given the same codebooks and neither k-means nor dead-code expiry, so
that it does no more than ours; ours normalises its input and gathers per-stage errors on top. Prints one JSON object;
`ratio` is the median time of ResidualVQ over ours (the target is at least 1.5).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from vector_quantize_pytorch import ResidualVQ

from bridle.config import QuantizerSettings
from bridle.modeling.quantizer import ResidualQuantizer

STAGES, SIZE, DIM, VECTORS = 4, 256, 256, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    vectors = latents(torch.device(arguments.device))
    ours = ResidualQuantizer(QuantizerSettings(codebooks=STAGES, codebook_size=SIZE, dim=DIM)).to(arguments.device)
    ours.initialize(vectors[:4096], torch.Generator().manual_seed(0))
    theirs = residual_vq(ours)
    agreement = (ours.encode(vectors).codes == theirs.eval()(vectors[None])[1][0]).float().mean().item()
    theirs.train()

    def our_step() -> None:
        ours(vectors)
        ours.update(None)

    times = rotated({"bridle": our_step, "ResidualVQ": lambda: theirs(vectors[None])}, arguments.rounds, vectors.device)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(
        json.dumps(
            {
                "device": arguments.device,
                "threads": arguments.threads,
                "rounds": arguments.rounds,
                "equal_codes_at_start": round(agreement, 5),
                "milliseconds": {name: round(1e3 * seconds, 2) for name, seconds in medians.items()},
                "ratio": round(medians["ResidualVQ"] / medians["bridle"], 2),
            }
        )
    )


def latents(device: torch.device) -> torch.Tensor:
    """Unit vectors around 512 centres, so that clusters exist: float32 ``[VECTORS, DIM]``."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(512, DIM, generator=generator)
    chosen = torch.randint(512, (VECTORS,), generator=generator)
    noise = torch.randn(VECTORS, DIM, generator=generator)
    return functional.normalize(centres[chosen] + 0.5 * noise, dim=-1).to(device)


def residual_vq(ours: ResidualQuantizer) -> ResidualVQ:
    """ResidualVQ with our codebooks, counts and sums, doing EMA only."""
    settings = ours.settings
    theirs = ResidualVQ(
        dim=settings.dim,
        num_quantizers=settings.codebooks,
        codebook_size=settings.codebook_size,
        decay=settings.decay,
        eps=settings.epsilon,
        commitment_weight=settings.beta,
        kmeans_init=False,
        threshold_ema_dead_code=0,
    ).to(ours.codebooks.device)
    for stage, layer in enumerate(theirs.layers):
        layer._codebook.embed.data.copy_(ours.codebooks[stage][None])
        layer._codebook.cluster_size.data.copy_(ours.cluster_size[stage][None])
        layer._codebook.embed_avg.data.copy_(ours.code_sum[stage][None])
    return theirs


def rotated(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order turns by one per round, the first round warms up."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
