"""Stopped at any moment and started again, a run goes on as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from launching import pretrain, rows, start_and_signal

from bridle.model_folder import load
from bridle.training.checkpoints import read_tensors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(run)
    return run


@pytest.mark.slow
def test_a_run_killed_at_random_steps_equals_an_undisturbed_one_to_the_last_digit(undisturbed, tmp_path):
    run = tmp_path / "run"
    total = len(rows(undisturbed))
    for rows_seen in sorted(random.Random(7).sample(range(1, total + 1), 3)):
        code, output = start_and_signal(run, rows_seen, signal.SIGKILL)
        assert code == -signal.SIGKILL, output
    pretrain(run)
    assert rows(run) == rows(undisturbed)
    assert not list(run.glob("checkpoints/*/.*"))
    for part in ("models/final/model.safetensors", "models/iteration-1/model.safetensors"):
        assert (run / part).read_bytes() == (undisturbed / part).read_bytes()


@pytest.mark.slow
def test_a_resumed_run_may_have_another_number_of_ranks_and_workers(undisturbed, tmp_path):
    run = tmp_path / "run"
    start_and_signal(run, 3, signal.SIGTERM)
    done = pretrain(run, "data.workers=1", ranks=2, config="zero3")
    assert "done" in done.stdout
    for ours, theirs in zip(rows(run), rows(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), (ours, theirs)


def test_a_finished_run_is_left_alone(undisturbed):
    before = {path: path.read_bytes() for path in sorted(undisturbed.rglob("*.safetensors"))}
    done = pretrain(undisturbed)
    assert "done" in done.stdout
    assert before == {path: path.read_bytes() for path in sorted(undisturbed.rglob("*.safetensors"))}


def test_a_model_that_a_finished_phase_stands_for_is_written_where_it_is_missing_or_torn(undisturbed, tmp_path):
    """As after a kill between the end of a phase and its export: a start checks what it claims."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "models/final")
    torn = run / "models/iteration-1/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    done = pretrain(run)
    assert "from step" not in done.stdout
    for name in ("models/final", "models/iteration-1"):
        ours, theirs = run / name / "model.safetensors", undisturbed / name / "model.safetensors"
        assert ours.read_bytes() == theirs.read_bytes()


def test_another_recipe_in_the_same_folder_is_refused(undisturbed):
    done = pretrain(undisturbed, "phases.1.lr=1e-4", check=False)
    assert done.returncode == 2
    assert "phases.1.lr" in done.stderr
    assert "another --run" in done.stderr


def test_a_run_leaves_what_the_contract_says(undisturbed):
    for name in ("recipe.yaml", "ds_config.json", "environment.json", "metrics.jsonl"):
        assert (undisturbed / name).is_file()
    assert list((undisturbed / "tensorboard").iterdir())
    for name in ("iteration-1", "iteration-2", "final"):
        assert load(undisturbed / "models" / name).info["codebooks"] == 2
    row = rows(undisturbed, with_times=True)[0]
    assert {"phase", "step", "samples", "loss", "lr", "samples_per_second", "data_wait", "accuracy"} <= row.keys()
    assert not list(undisturbed.rglob("*.partial"))


def test_iteration_2_trains_on_the_codebooks_that_iteration_2_learned(undisturbed):
    """Strict loading: nothing re-initialises a trained codebook on the way to the next phase or the model folder."""
    learned = read_tensors(undisturbed / "checkpoints/phase-2-tokenizer/finished/tokenizer.safetensors")
    served = load(undisturbed / "models/final").tokenizer.state_dict()
    assert learned.keys() == served.keys()
    assert all((learned[key] == served[key]).all() for key in learned)
    assert bool(served["quantizer.initialized"])
