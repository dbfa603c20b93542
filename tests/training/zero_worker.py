"""Run under the deepspeed launcher by test_zero.py: every ZeRO stage and precision, one engine after another."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from bridle.config import TrainSettings, load_recipe
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape
from bridle.training.checkpoints import PhaseCheckpoints, Position
from bridle.training.engine import build_engine, read_ds_config, resolve_ds_config, set_learning_rate
from bridle.training.keeper import Keeper
from bridle.training.optimizer_state import gather_state
from bridle.training.phases import TokenizerPhaseJob
from bridle.training.ranks import Ranks
from bridle.training.rendezvous import join, leave
from bridle.training.shared_tensors import fill

TRAIN = TrainSettings(batch_size=4, gradient_clipping=1.0)
COMBINATIONS = [pair for pair in product((0, 1, 2, 3), ("fp32", "bf16", "autocast")) if pair != (0, "bf16")]
COMBINATIONS.append((3, "offload_bf16"))
"""Stage 0 with bf16 is refused: see test_settings.py."""


def ds_config(stage: int, precision: str, world: int) -> dict:
    given: dict = {"zero_optimization": {"stage": stage}}
    if precision.endswith("bf16"):
        given = read_ds_config(f"builtin:zero{stage}_{precision}")
    elif precision == "autocast":
        given["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    given["zero_optimization"] |= {"reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000}
    return resolve_ds_config(given, "test", TRAIN, world)


def engine_of(ranks: Ranks, config: dict, checkpoint: Path | None):
    recipe = load_recipe(str(Path(__file__).with_name("tiny.yaml")))
    make = Components(recipe.model, PatchShape(1, (16, 16)))
    learner = make.tokenizer(1)
    if checkpoint is None:
        latents = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
        learner.quantizer.initialize(latents, torch.Generator().manual_seed(1))
    job = TokenizerPhaseJob(learner, make.estimator(2), make.encoder(3), recipe.model.quantizer, ranks.device, False)
    if checkpoint is not None:
        fill(job.module, checkpoint / "model.safetensors", ranks)
    engine = build_engine(job.module, config, TRAIN, 1e-3)
    if checkpoint is not None:
        PhaseCheckpoints(checkpoint.parents[2], 2, "tokenizer").restore(engine, 3, ranks)
    return engine, job


def step(engine, job, ranks: Ranks, number: int) -> float:
    values = torch.randn(4, 1, 64, 128, generator=torch.Generator().manual_seed(number))
    share = 4 // ranks.world
    batch = {"values": values[ranks.rank * share : (ranks.rank + 1) * share]}
    set_learning_rate(engine, 1e-3)
    loss, *_ = engine(*job.inputs(batch))
    engine.backward(loss)
    engine.step()
    job.after_step(ranks.all_reduce)
    return ranks.sum(loss.detach().double()).item() / ranks.world


def snapshot(engine) -> dict[str, torch.Tensor]:
    weights, moments = gather_state(engine, keep=True)
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers() if "statistics" not in name}
    return weights | moments | buffers


def accumulated_error(ranks: Ranks, stage: int, shipped: bool) -> float:
    """Relative error, against float64, of a gradient accumulated over 64 micro-steps in bfloat16; shipped: with all
    that the configuration that ships says."""
    given = read_ds_config(f"builtin:zero{stage}_bf16")
    if not shipped:
        del given["data_types"]
    train = TrainSettings(batch_size=64 * ranks.world, micro_batch_size=1)
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 64)
    engine = build_engine(module, resolve_ds_config(given, "test", train, ranks.world), train, 1e-3)
    weights, exact = module.weight.detach().double(), torch.zeros(64, 64, dtype=torch.float64)
    for number in range(64):
        generator = torch.Generator().manual_seed(number * ranks.world + ranks.rank)
        points = torch.randn(8, 64, generator=generator).bfloat16()
        engine.backward(engine(points).float().square().mean())
        out = points.double() @ weights.T + module.bias.detach().double()
        exact += 2 / out.numel() * out.T @ points.double() / 64
        if number < 63:
            engine.step()
    found = safe_get_full_grad(module.weight).double()
    exact = ranks.sum(exact) / ranks.world
    engine.step()
    engine.destroy()
    return float((found - exact).norm() / exact.norm())


def main(folder: Path) -> None:
    ranks = join()
    report, keeper = {}, Keeper(ranks)
    errors = {
        f"{stage}-{kept}": accumulated_error(ranks, stage, kept == "fp32")
        for stage in (1, 2)
        for kept in ("fp32", "bf16")
    }
    for stage, precision in COMBINATIONS:
        run = folder / f"{stage}-{precision}"
        config = ds_config(stage, precision, ranks.world)
        engine, job = engine_of(ranks, config, None)
        losses = [step(engine, job, ranks, number) for number in range(3)]
        before = snapshot(engine)
        checkpoint = PhaseCheckpoints(run, 2, "tokenizer").save(engine, Position(step=3, samples=12), keeper)
        keeper.settle()
        after = [step(engine, job, ranks, number) for number in range(3, 5)]
        engine.destroy()

        engine, job = engine_of(ranks, config, checkpoint)
        restored = snapshot(engine)
        again = [step(engine, job, ranks, number) for number in range(3, 5)]
        quantizer = job.quantizer
        report[f"{stage}-{precision}"] = {
            "losses": losses + after,
            "restored_exactly": all(torch.equal(before[name], restored[name]) for name in before),
            "after": after,
            "again": again,
            "codebooks_dtype": str(quantizer.codebooks.dtype),
            "codebooks_equal_on_all_ranks": bool(
                (ranks.gather(quantizer.codebooks[None]) == quantizer.codebooks).all()
            ),
            "parameter_dtype": str(engine.module.tokenizer.head[0].weight.dtype),
            "statistics_cleared": bool((quantizer.statistics == 0).all()),
        }
        engine.destroy()
    if ranks.first:
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "errors.json").write_text(json.dumps(errors))
    leave()


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
