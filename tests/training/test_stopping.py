"""Whatever asks a run to stop, and whenever: it saves or had nothing to save, says so, exits 75, and leaves nobody."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from halting import Halt
from launching import (
    end_when_heard,
    output_of,
    pretrain,
    processes_of,
    ranks_of,
    rows,
    start,
    start_and_signal,
    wait_for,
    wait_for_rows,
)  # fmt: skip
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


def stop(process: subprocess.Popen | WarmProcess, number: int, run: Path, halt: Halt | None = None) -> str:
    process.send_signal(number)
    if halt is not None:
        end_when_heard(halt, process, run)
    code = process.wait(timeout=300)
    assert code == 75, (code, output_of(run))
    assert "Traceback" not in output_of(run)
    assert not (run / "lock.json").exists()
    return output_of(run)


def test_a_stop_saves_nothing_of_a_run_whose_loss_is_no_number(tmp_path):
    run, halt = tmp_path / "run", Halt("[1 encoder] the end of step 4", tmp_path / "halt")
    process = start(run, *SPARSE, "phases.1.lr=1.0e+30", halt=halt)
    wait_for(halt.reached, process, run)
    process.send_signal(signal.SIGTERM)
    end_when_heard(halt, process, run)
    assert process.wait(timeout=300) == 1
    assert "the loss is not finite at step 5 of phase 1" in output_of(run)
    assert not list(run.glob("checkpoints/phase-1-encoder/step-*"))


@pytest.mark.slow
def test_each_signal_saves_between_two_rows_and_the_run_goes_on_exactly(undisturbed, tmp_path):
    run = tmp_path / "run"
    for phase, kind, number in zip((1, 2, 3), ("encoder", "tokenizer", "encoder"), SIGNALS, strict=True):
        halt = Halt(f"[{phase} {kind}] the end of step {phase + 3}", tmp_path / "halt")
        process = start(run, *SPARSE, halt=halt)
        wait_for(halt.reached, process, run)
        assert f"stopped by {number.name}" in stop(process, number, run, halt)
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


def cpu_of_children() -> float:
    """Seconds of CPU of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_it_imports_ends_it_at_once_with_nothing_left(tmp_path, number):
    run = tmp_path / "run"
    process = start(run, warm=False)
    wait_for(lambda: heard(process, signal.SIGUSR1), process, run)
    times, others = psutil.Process(process.pid).cpu_times(), cpu_of_children()
    stop(process, number, run)
    assert cpu_of_children() - others - times.user - times.system < 5  # of CPU: the clock tells of others' work too
    assert not run.exists()


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_and_the_evaluation_is_made_up_for_once(tmp_path):
    steps = ("phases.1.steps=40", "train.evaluate_every=20", "train.log_every=20", "train.checkpoint_every=1000")
    short = [f"phases.{i}.steps=2" for i in (2, 3)]
    given = ("--data", "builtin:audio", "--heldout", "builtin:audio", "train.evaluate_clips=80", *steps, *short)
    run, other = tmp_path / "run", tmp_path / "other"
    pretrain(other, *given)
    halt = Halt("evaluation", tmp_path / "halt")
    process = start(run, *given, halt=halt)
    wait_for(halt.reached, process, run)
    stop(process, signal.SIGTERM, run, halt)
    [saved] = run.glob("checkpoints/phase-1-encoder/step-*/state.json")
    assert json.loads(saved.read_text())["evaluation_due"]
    assert len(rows(run)) == 1
    code, output = start_and_signal(run, 2, signal.SIGKILL, *given)
    assert code == -signal.SIGKILL, output
    assert len(rows(run)) == 2  # made up for, and lost again: its checkpoint is from before
    pretrain(run, *given)
    assert rows(run) == rows(other)


LATE = """
import os, signal, sys
from bridle.pretrain import begin
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)
last = Last()  # goes when Python has given signals their default action back
sys.exit(begin("pretrain", __file__, lambda stop, foreign: int(sys.argv[1])))
"""


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_signal_while_python_shuts_down_changes_no_exit_code(tmp_path, code):
    """A launcher ends the others when a rank has lost its peer: they are at their own end already, with 75."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    done = subprocess.run([sys.executable, str(script), str(code)], check=False, timeout=300)
    assert done.returncode == code


def wait_for_end(what: Callable[[], object], run: Path) -> None:
    deadline = time.monotonic() + 300
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
    wait_for_end(lambda: "stopping after this step" in output_of(run) or "checkpoint step" in output_of(run), run)
    _, left = psutil.wait_procs(ranks, timeout=120)
    assert not left
    process.wait(timeout=120)
    assert "same command goes on" in output_of(run)
    assert list(run.glob("checkpoints/phase-1-encoder/step-*/state.json"))
    psutil.wait_procs(processes_of(run), timeout=120)
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
