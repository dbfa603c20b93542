"""What each phase begins with, and what its held-out figures are of: shown by phases that hardly move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from launching import TINY, pretrain, rows

from bridle.data.shards import open_shards
from bridle.evaluation.health import FOLDS, CodeFit
from bridle.model_folder import load, stacked
from bridle.modeling.quantizer import normalize
from bridle.training.checkpoints import read_tensors

STILL = {"steps": 1, "warmup_steps": 0, "lr": 1e-12}
PHASES = [
    {"kind": "cold_start"},
    {"kind": "encoder", "steps": 6, "warmup_steps": 1, "lr": 1e-2},
    {"kind": "tokenizer", "init": "teacher", "target": "standardized", **STILL},
    {"kind": "encoder", "init": "continue", "soft_codes": 2, **STILL},
    {"kind": "tokenizer", "init": "scratch", **STILL},
    {"kind": "encoder", "init": "scratch", **STILL},
    {"kind": "joint", "init": "continue", **STILL},
    {"kind": "joint", "init": "scratch", **STILL},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    recipe = yaml.safe_load(TINY.read_text()) | {"phases": PHASES}
    recipe["model"]["estimator"]["attention"] = False
    (folder / "still.yaml").write_text(yaml.safe_dump(recipe))
    pretrain(folder / "run", "--recipe", str(folder / "still.yaml"), "train.evaluate_clips=20")
    return folder / "run"


def finished(run: Path, phase: str, part: str) -> dict[str, torch.Tensor]:
    return read_tensors(run / f"checkpoints/phase-{phase}/finished/{part}.safetensors")


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], prefix: str = "") -> float:
    """Largest difference of any weight."""
    return max(float((second[prefix + name] - value).abs().max()) for name, value in first.items())


def test_an_encoder_phase_continues_from_the_one_before_unless_told_otherwise(run):
    first, second, third = (finished(run, f"{i}-encoder", "encoder") for i in (1, 3, 5))
    assert apart(first, second) < 1e-6
    assert apart(second, third) > 0.01


def test_a_tokenizer_starts_from_its_teacher_or_afresh(run):
    teacher = finished(run, "1-encoder", "encoder")
    assert apart(teacher, finished(run, "2-tokenizer", "tokenizer"), "encoder.") < 1e-6
    assert apart(teacher, finished(run, "4-tokenizer", "tokenizer"), "encoder.") > 0.01


def test_a_joint_phase_continues_both_halves_or_starts_afresh(run):
    encoder, tokenizer = finished(run, "5-encoder", "encoder"), finished(run, "4-tokenizer", "tokenizer")
    head = {name: value for name, value in tokenizer.items() if not name.startswith("quantizer.")}
    assert apart(encoder, finished(run, "6-joint", "encoder")) < 1e-6
    assert apart(head, finished(run, "6-joint", "tokenizer")) < 1e-6
    assert apart(encoder, finished(run, "7-joint", "encoder")) > 0.01
    assert apart(head, finished(run, "7-joint", "tokenizer")) > 0.01


def test_a_standardised_target_has_the_teachers_mean_and_deviation_over_the_first_batches(run):
    """They stand beside the tokenizer; over the training clips the embeddings they are of have about the same."""
    target = finished(run, "2-tokenizer", "target")
    model = load(run / "models/iteration-2")
    shards = open_shards(["builtin:audio"], extensions=model.modality.extensions)
    clips = [next(iter(model.modality.windows(shards.data(i)))) for i in range(len(shards))]
    found = [model.embed(*stacked([clip]))[0, : clip.positions] for clip in clips]
    embeddings = torch.cat(found)
    mean, deviation = embeddings.mean(0), embeddings.std(0)
    assert ((target["mean"] - mean).abs() < 0.5 * deviation).all()
    assert (target["deviation"] / deviation).log().abs().max() < 0.5
    assert not (run / "checkpoints/phase-4-tokenizer/finished/target.safetensors").exists()


def test_held_out_figures_are_of_whole_clips_as_they_are(run):
    """No augmentation, no padding: recomputed from the model folder and the held-out shards alone."""
    model, cold = load(run / "models/iteration-2"), load(run / "models/iteration-1")
    shards = open_shards(["builtin:audio-heldout"], extensions=model.modality.extensions)
    clips = [next(iter(model.modality.windows(shards.data(i)))) for i in range(20)]
    values, valid = stacked(clips)
    assert min(valid) < max(valid), "some clip must be padded"
    content = [slice(0, count) for count in valid]
    codes, cold_codes, teacher = model.codes(values, valid), cold.codes(values, valid), cold.embed(values, valid)
    row = next(row for row in rows(run) if row["phase_index"] == 2 and row["split"] == "heldout")
    everything = torch.cat([codes[i, part] for i, part in enumerate(content)])
    counts = torch.stack([torch.bincount(stage, minlength=16) for stage in everything.T])
    assert row["codebook_majority"] == pytest.approx((counts.amax(1) / counts.sum(1)).tolist())
    for name, found in (("r2", codes), ("r2_cold_start", cold_codes)):
        fit = CodeFit(2, 16, teacher.shape[-1], torch.device("cpu"))
        for i, part in enumerate(content):
            fit.add(found[i, part], teacher[i, part], torch.full((valid[i],), i % FOLDS))
        assert row[name] == pytest.approx(fit.r2(lambda sums: sums), abs=1e-3)
    for name, tokenizer in (("participation_ratio", model), ("participation_ratio_cold_start", cold)):
        latents = normalize(tokenizer.latents(values, valid))
        spread = torch.cat([latents[i, part] for i, part in enumerate(content)]).T.cov()
        assert row[name] == pytest.approx(float(spread.trace() ** 2 / (spread @ spread).trace()), rel=1e-3)
    better = row["r2"] > row["r2_cold_start"], row["participation_ratio"] > row["participation_ratio_cold_start"]
    assert row["verdict"] and row["healthy"] is all(better)
