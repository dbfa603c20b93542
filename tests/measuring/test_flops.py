"""The formula of a step's operations against torch's counter, on the phases that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridle.config import load_recipe
from bridle.measuring.workbench import Workbench, trained_phases
from bridle.modeling.masking import draw_mask
from bridle.training.phases import PhaseJob
from bridle.training.ranks import Ranks

JOINT = "phases=[{kind: cold_start}, {kind: joint, steps: 2, lr: 0.1, tokenizer_every: 4, target: raw}]"
SMALL = ["train.batch_size=2", "model.estimator.attention=true"]


def workbench(name: str, folder: Path, *overrides: str) -> Workbench:
    recipe = load_recipe(name, [*SMALL, *overrides])
    return Workbench(recipe, {}, "no file", Ranks(0, 1, torch.device("cpu")), folder)


def inputs(bench: Workbench) -> dict[str, torch.Tensor]:
    import numpy as np

    grid, patch = tuple(bench.modality.grid.values()), bench.make.patch
    masks = [draw_mask(bench.recipe.mask, grid, np.random.default_rng(seed)) for seed in range(2)]
    return {
        "values": torch.randn(2, patch.channels, *(n * side for n, side in zip(grid, patch.size, strict=True))),
        "masked": torch.stack([mask.nonzero().flatten() for mask in masks]),
        "visible": torch.stack([(~mask).nonzero().flatten() for mask in masks]),
    }


def counted(job: PhaseJob, batch: dict[str, torch.Tensor]) -> float:
    """Operations a clip by torch's counter, with attention as the products that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, *_ = job.module(*job.inputs(batch))
        loss.backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["audio-mini", "image-mini", "video-mini"])
def test_the_formula_is_what_torch_counts_in_every_phase(name: str, tmp_path: Path) -> None:
    bench = workbench(name, tmp_path)
    for index in trained_phases(bench.recipe):
        assert bench.flops.of_phase(index) == counted(bench.job(index), inputs(bench))


def test_what_is_computed_again_is_done_and_not_counted(tmp_path: Path) -> None:
    bench = workbench("audio-mini", tmp_path, "train.activation_checkpointing=true")
    done, formula = counted(bench.job(1), inputs(bench)), bench.flops.of_phase(1)
    assert 1.2 < done / formula < 1.4  # nearly four passes for three
    assert formula == workbench("audio-mini", tmp_path).flops.of_phase(1)


def test_a_joint_phase_is_counted_as_the_mean_of_learning_and_resting_steps(tmp_path: Path) -> None:
    bench = workbench("audio-mini", tmp_path, JOINT)
    job, batch = bench.job(1), inputs(bench)
    found = []
    for step in range(4):
        job.begin_step(step)
        found.append(counted(job, batch))
    assert found[0] > found[1] == found[2] == found[3]
    assert bench.flops.of_phase(1) == sum(found) / 4
