"""Whatever asks a run to stop, and whenever: it saves or had nothing to save, says so, exits 75, and leaves nobody."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import output_of, pretrain, processes_of, ranks_of, rows, start, wait_for, wait_for_rows
from warm import WarmProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SPARSE = ("train.log_every=1000", "train.checkpoint_every=1000")
"""Rows only at the end of a phase: a stop falls between two of them."""
ENDLESS = ("phases.1.steps=50000", "train.log_every=2", "train.checkpoint_every=50000")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(run, *SPARSE)
    return run


def stop(process: subprocess.Popen | WarmProcess, number: int, run: Path) -> str:
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == 75, (code, output_of(run))
    assert "Traceback" not in output_of(run)
    assert not (run / "lock.json").exists()
    return output_of(run)


@pytest.mark.slow
def test_each_signal_saves_between_two_rows_and_the_run_goes_on_exactly(undisturbed, tmp_path):
    run = tmp_path / "run"
    for phase, number in zip((1, 2, 3), SIGNALS, strict=True):
        process = start(run, *SPARSE)
        wait_for(lambda begun=f"[{phase} ": begun in output_of(run) and "from step" in output_of(run), process, run)
        assert f"stopped by {number.name}" in stop(process, number, run)
        [saved] = run.glob(f"checkpoints/phase-{phase}-*/step-*/state.json")
        state = json.loads(saved.read_text())
        assert 0 < state["step"] < 10
        assert state["window"]
    pretrain(run, *SPARSE)
    assert rows(run) == rows(undisturbed)


def heard(process: subprocess.Popen | WarmProcess, number: int) -> bool:
    """Whether the process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_it_imports_ends_it_at_once_with_nothing_left(tmp_path, number):
    run = tmp_path / "run"
    process = start(run, warm=False)
    wait_for(lambda: heard(process, signal.SIGUSR1), process, run)
    began = time.monotonic()
    stop(process, number, run)
    assert time.monotonic() - began < 5
    assert not run.exists()


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_and_the_evaluation_is_made_up_for_once(tmp_path):
    steps = ("phases.1.steps=40", "train.evaluate_every=20", "train.log_every=20", "train.checkpoint_every=1000")
    short = [f"phases.{i}.steps=2" for i in (2, 3)]
    given = ("--data", "builtin:audio", "--heldout", "builtin:audio", "train.evaluate_clips=80", *steps, *short)
    run, other = tmp_path / "run", tmp_path / "other"
    pretrain(other, *given)
    process = start(run, *given)
    wait_for_rows(run, 1, process)
    stop(process, signal.SIGTERM, run)
    [saved] = run.glob("checkpoints/phase-1-encoder/step-*/state.json")
    assert json.loads(saved.read_text())["evaluation_due"]
    assert len(rows(run)) == 1
    process = start(run, *given)
    wait_for_rows(run, 2, process)  # made up for, and lost again: its checkpoint is from before
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert len(rows(run)) == 2
    pretrain(run, *given)
    assert rows(run) == rows(other)


def wait_for_end(what: Callable[[], object], run: Path) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, output_of(run)
        time.sleep(0.05)


def the_spawner(process: subprocess.Popen) -> int:
    """DeepSpeed's launch.py, the runner's child."""
    [spawner] = psutil.Process(process.pid).children()
    return spawner.pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number"),
    [("runner", signal.SIGTERM), ("spawner", signal.SIGKILL), ("rank", signal.SIGTERM)],
)
def test_ranks_whose_launcher_is_gone_save_and_end(tmp_path, whom, number):
    run = tmp_path / "run"
    process = start(run, *ENDLESS, ranks=2)
    wait_for_rows(run, 1, process)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    victim = {"runner": process.pid, "spawner": the_spawner(process), "rank": ranks[1].pid}[whom]
    psutil.Process(victim).send_signal(number)
    began = time.monotonic()
    wait_for_end(lambda: "stopping after this step" in output_of(run) or "checkpoint step" in output_of(run), run)
    assert time.monotonic() - began < 5
    _, left = psutil.wait_procs(ranks, timeout=20)
    assert not left
    process.wait(timeout=20)
    assert "same command goes on" in output_of(run)
    assert list(run.glob("checkpoints/phase-1-encoder/step-*/state.json"))
    psutil.wait_procs(processes_of(run), timeout=5)
    assert not processes_of(run)
    assert not (run / "lock.json").exists()


@pytest.mark.slow
def test_ranks_whose_launcher_died_before_they_were_there_end(tmp_path):
    run = tmp_path / "run"
    process = start(run, *ENDLESS, ranks=2)
    wait_for(lambda: len(processes_of(run)) >= 2, process, run)
    process.kill()
    process.wait()
    wait_for_end(lambda: not processes_of(run), run)
    assert not run.exists()
