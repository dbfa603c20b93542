"""`bridle status` says how a run is, and its exit code says it to scripts."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from halting import Halt
from launching import BRIDLE, ROOT, environment, pretrain, start, start_and_signal, wait_for


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
