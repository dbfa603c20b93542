"""How long training waits for a checkpoint: written behind it, against written while it waits, in one run.

    python benchmarks/checkpoint.py [--recipe audio] [--rounds 5] [--batch 2] [--stage 1] [--folder DIR] [key=value ...]

Both ways copy the same state (weights, buffers, Adam's moments) and write, hash, flush and name the same files; the
second waits for that before its next step, as training did before. In turns, in the same process. Said beside it: how
long the writing took, and a step's time while it went on over a step's time alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridle.config import Recipe, load_recipe
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components
from bridle.modeling.masking import draw_mask
from bridle.training.checkpoints import PhaseCheckpoints, Position
from bridle.training.engine import build_engine, resolve_ds_config
from bridle.training.keeper import Keeper
from bridle.training.phases import EncoderPhaseJob
from bridle.training.ranks import Ranks
from bridle.training.rendezvous import join, leave


def training(recipe: Recipe, batch: int, stage: int, ranks: Ranks) -> tuple[Any, Callable[[], None]]:
    """The engine of an encoder phase, and one step of it on random clips."""
    modality = build_modality(recipe.modality, recipe.clip)
    patch = patch_shape(modality)
    make = Components(recipe.model, patch)
    tokenizer = make.cold_start_tokenizer(0)
    latents = torch.randn(4096, recipe.model.quantizer.dim, generator=torch.Generator().manual_seed(0))
    tokenizer.quantizer.initialize(latents, torch.Generator().manual_seed(0))
    job = EncoderPhaseJob(
        make.encoder(1), make.decoder(2), tokenizer, recipe.model.quantizer, device=ranks.device, bf16=False
    )
    train = recipe.train.model_copy(update={"batch_size": batch, "micro_batch_size": None})
    config = resolve_ds_config({"zero_optimization": {"stage": stage}}, "benchmark", train, ranks.world)
    engine = build_engine(job.module, config, train, 1e-4)
    size = [count * side for count, side in zip(modality.grid.values(), patch.size, strict=True)]
    rng = np.random.default_rng(0)
    masks = [draw_mask(recipe.mask, tuple(modality.grid.values()), rng) for _ in range(batch)]
    inputs = {
        "values": torch.randn(batch, patch.channels, *size, device=ranks.device),
        "masked": torch.stack([mask.nonzero().flatten() for mask in masks]).to(ranks.device),
        "visible": torch.stack([(~mask).nonzero().flatten() for mask in masks]).to(ranks.device),
    }

    def step() -> None:
        loss, *_ = engine(*job.inputs(inputs))
        engine.backward(loss)
        engine.step()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    return engine, step


def seconds(job: Callable[[], Any]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="audio")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="e.g. model.size=small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    args = parser.parse_args()
    ranks = join()
    engine, step = training(load_recipe(args.recipe, args.overrides), args.batch, args.stage, ranks)
    keeper = Keeper(ranks)
    behind, waited, written, alone, beside = [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = PhaseCheckpoints(Path(folder), 1, "encoder")
        for number in range(args.rounds + 1):
            alone.append(seconds(step))
            began = time.perf_counter()
            behind.append(seconds(lambda at=number: checkpoints.save(engine, Position(step=2 * at), keeper)))
            while not keeper.idle:
                beside.append(seconds(step))
            keeper.settle()
            written.append(time.perf_counter() - began)
            step()

            def wait_for(at: int = number) -> None:
                checkpoints.save(engine, Position(step=2 * at + 1), keeper)
                keeper.settle()

            waited.append(seconds(wait_for))
        size = sum(file.stat().st_size for file in checkpoints.steps()[-1].iterdir()) / 1e9
    keeper.close()
    leave()
    median = {
        name: statistics.median(values[1:])  # the first of each warms up
        for name, values in {"behind": behind, "waited": waited, "written": written, "alone": alone}.items()
    }
    print(
        f"checkpoint of {size:.2f} GB, {torch.get_num_threads()} threads, {ranks.device}, {args.rounds} rounds, medians"
    )
    print(f"stall, written behind training: {median['behind']:.3f} s")
    print(f"stall, training waits:          {median['waited']:.3f} s")
    print(f"ratio:                          {median['waited'] / median['behind']:.1f}")
    print(f"written after                   {median['written']:.3f} s")
    if beside:
        print(f"a step while it is written:     {statistics.median(beside) / median['alone']:.2f} of a step alone")


if __name__ == "__main__":
    main()
