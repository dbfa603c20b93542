"""A disk that is full costs a checkpoint, not the run; and nothing that was good."""

from __future__ import annotations

import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest
from launching import ROOT, command, environment, free_port, rows

from bridle.training.manifest import check_folder


def alarms(port: int, kind: str) -> float:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return float(
        next(line for line in lines if line.startswith(f'bridle_train_alarms_total{{kind="{kind}"}}')).split()[1]
    )


def steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints/phase-1-encoder").glob("step-*"))


@pytest.mark.slow
def test_training_goes_on_over_a_full_disk_and_writes_again_when_there_is_room(tmp_path):
    """No file may grow over what metrics.jsonl has now: neither a checkpoint nor a row finds room."""
    run, port = tmp_path / "run", free_port()
    settings = ("phases.1.steps=50000", "train.checkpoint_every=10", f"train.prometheus_port={port}")
    process = subprocess.Popen(
        command(run, *settings), env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(process.stdout), daemon=True).start()

    def wait_for(what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not what():
            assert process.poll() is None, "".join(said)
            assert time.monotonic() < deadline, "".join(said)
            time.sleep(0.01)

    wait_for(lambda: len(steps(run)) == 2)
    process.send_signal(signal.SIGSTOP)  # else a row may come between the size and the limit
    size = (run / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: alarms(port, "checkpoint") >= 2 and alarms(port, "metrics") >= 2)
    stood = steps(run)
    assert len(stood) == 2
    for folder in stood:
        check_folder(folder)
    assert (run / "metrics.jsonl").stat().st_size <= size
    line = next(line for line in said if "was not written" in line)
    assert "training goes on, the next checkpoint tries again" in line
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for(lambda: not set(stood) & set(steps(run)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75, "".join(said)
    assert not any("Traceback" in line for line in said)
    for folder in steps(run):
        check_folder(folder)
    assert not list(run.rglob("*.partial"))
    seen = [row["step"] for row in rows(run)]
    assert seen == list(range(2, seen[-1] + 1, 2))
