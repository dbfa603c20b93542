"""`--from`: a run that begins with what another one had learned, with a recipe of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from launching import TINY, pretrain, rows

from bridle.config import load_recipe
from bridle.model_folder import load
from bridle.settings import RecipeError
from bridle.training.manifest import CheckpointError
from bridle.training.origin import begin_from


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    pretrain(run)
    return run


@pytest.mark.slow
def test_the_same_recipe_from_a_checkpoint_repeats_the_rest_to_the_last_digit(first, tmp_path):
    run = tmp_path / "run"
    pretrain(run, "--from", f"{first}:1:8")
    assert rows(run) == [row for row in rows(first) if (row["phase_index"], row["step"]) > (1, 8)]
    final = "models/final/model.safetensors"
    assert (run / final).read_bytes() == (first / final).read_bytes()
    before = rows(run, with_times=True)
    assert "done" in pretrain(run, "--from", f"{first}:1:8").stdout  # the same command goes on
    assert rows(run, with_times=True) == before
    other = pretrain(run, "--from", f"{first}:1", check=False)
    assert other.returncode == 2
    assert "was begun from" in other.stderr


@pytest.mark.slow
def test_a_smaller_batch_goes_on_behind_the_clips_that_were_seen(first, tmp_path):
    run = tmp_path / "run"
    pretrain(run, "--from", f"{first}:1:8", "train.batch_size=4", "phases.2.steps=2", "phases.3.steps=2")
    (row,) = [row for row in rows(run) if (row["phase_index"], row["split"]) == (1, "train")]
    assert (row["step"], row["samples"]) == (10, 8 * 8 + 2 * 4)


@pytest.mark.slow
def test_another_tokenizer_is_trained_on_the_same_encoder(first, tmp_path):
    run = tmp_path / "run"
    pretrain(run, "--from", f"{first}:1", "model.quantizer.codebooks=3", "phases.2.steps=2", "phases.3.steps=2")
    assert {row["phase_index"] for row in rows(run)} == {2, 3}
    assert load(run / "models/final").info["codebooks"] == 3
    assert not (run / "models/iteration-1").exists()  # that model is the first run's
    teacher = "checkpoints/phase-1-encoder/finished/encoder.safetensors"
    assert (run / teacher).read_bytes() == (first / teacher).read_bytes()


@pytest.mark.slow
def test_a_run_that_broke_names_the_clips_and_begins_again_with_a_lower_rate(tmp_path):
    short = ("phases.1.steps=4", "phases.3.steps=2", "phases.2.steps=20", "phases.2.warmup_steps=8")
    broken = pretrain(tmp_path / "broken", *short, "phases.2.lr=1e30", check=False)
    assert broken.returncode == 1
    line = next(line for line in broken.stderr.splitlines() if "not finite" in line)
    assert re.search(r"the batch that begins with \S+ of \S*audio-train\S*\.tar", line), line
    assert re.search(rf"--from {tmp_path / 'broken'}:\d", line), line
    run = tmp_path / "mended"
    pretrain(run, *short, "--from", f"{tmp_path / 'broken'}:1", "phases.2.lr=1e-3", "phases.2.steps=2")
    assert (run / "models/final/config.json").is_file()


@pytest.mark.parametrize(
    ("where", "overrides", "said"),
    [
        (":7", [], "phases 0 to 3"),
        (":1:6", [], "phase 1 has checkpoints 8, and its result"),
        (":3", [], "nothing is left to train"),
        (":2", ['phases=[{"kind": "cold_start"}, {"kind": "encoder", "steps": 1, "lr": 1}]'], "the same kinds"),
        ("-none", [], "no recipe.yaml there"),
    ],
)
def test_what_cannot_be_begun_from_is_said(where, overrides, said, first, tmp_path):
    with pytest.raises(RecipeError, match=said):
        begin_from(f"{first}{where}", tmp_path / "run", load_recipe(str(TINY), overrides))
    assert not (tmp_path / "run").exists()


def test_nothing_damaged_is_begun_from(first, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(first, source)
    path = source / "checkpoints/phase-1-encoder/finished/encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: damaged"):
        begin_from(f"{source}:1", tmp_path / "run", load_recipe(str(TINY)))
