"""`bridle status` says how a run is, and its exit code says it to scripts."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from launching import BRIDLE, ROOT, environment, output_of, pretrain, start, wait_for, wait_for_rows


def status(run: Path, *more: str) -> tuple[int, str]:
    done = subprocess.run(
        [BRIDLE, "status", str(run), *more], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_is_running_then_dead_then_stopped_then_finished(tmp_path):
    run = tmp_path / "run"
    long_enough_to_be_asked = ["train.log_every=1", "phases.1.steps=300"]
    process = start(run, *long_enough_to_be_asked)
    wait_for_rows(run, 5, process)
    code, said = status(run, "--json")
    assert code == 0, said
    found = json.loads(said)
    assert (found["state"], found["pid"]) == ("running", process.pid)
    assert found["train"]["step"] > 0
    assert found["train"]["total_steps"] == 300
    assert found["seconds_left"] >= 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, said = status(run)
    assert code == 5, said
    assert f"was held by process {process.pid}" in said

    process = start(run, *long_enough_to_be_asked)
    wait_for(lambda: "[1 encoder] step" in output_of(run), process, run)  # rows may still be the first one's
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, output_of(run)
    code, said = status(run)
    assert code == 4, said
    assert "stopped by SIGTERM" in said
    assert "step-" in said

    pretrain(run, *long_enough_to_be_asked)
    code, said = status(run, "--watch")
    assert code == 3, said
    assert "4 of 4 finished" in said
    assert "held out   loss" in said


def test_a_folder_without_a_run_is_a_wrong_argument(tmp_path):
    code, said = status(tmp_path)
    assert code == 2
    assert "recipe.yaml" in said
