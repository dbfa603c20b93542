"""`bridle status` says how a run is, and its exit code says it to scripts."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from halting import Halt
from launching import BRIDLE, ROOT, environment, pretrain, start, start_and_signal, wait_for

from bridle.training.status import look


def status(run: Path, *more: str) -> tuple[int, str]:
    done = subprocess.run(
        [BRIDLE, "status", str(run), *more], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_is_running_then_dead_then_stopped_then_finished(tmp_path):
    run = tmp_path / "run"
    arguments = ["train.log_every=1", "phases.1.steps=20"]
    halt = Halt("row 5", tmp_path / "halt")
    process = start(run, *arguments, halt=halt)
    wait_for(halt.reached, process, run)
    code, said = status(run, "--json")
    assert code == 0, said
    found = json.loads(said)
    assert (found["state"], found["pid"]) == ("running", process.pid)
    assert found["train"]["step"] > 0
    assert found["train"]["total_steps"] == 20
    assert found["seconds_left"] >= 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, said = status(run)
    assert code == 5, said
    assert f"was held by process {process.pid}" in said

    code, said = start_and_signal(run, 7, signal.SIGTERM, *arguments)
    assert code == 75, said
    code, said = status(run)
    assert code == 4, said
    assert "stopped by SIGTERM" in said
    assert "step-" in said

    pretrain(run, *arguments)
    code, said = status(run, "--watch")
    assert code == 3, said
    assert "4 of 4 finished" in said
    assert "held out   loss" in said


def test_a_folder_without_a_run_is_a_wrong_argument(tmp_path):
    code, said = status(tmp_path)
    assert code == 2
    assert "recipe.yaml" in said


def test_the_newest_checkpoint_is_of_the_last_phase_also_of_more_than_ten(tmp_path):
    (tmp_path / "recipe.yaml").write_text((ROOT / "tests/training/tiny.yaml").read_text())
    for name in ("phase-9-tokenizer/step-00000900", "phase-10-encoder/step-00000004", "set-aside/phase-11-a.0/step-1"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    assert look(str(tmp_path)).checkpoint == "phase-10-encoder/step-00000004"
