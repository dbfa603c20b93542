"""`bridle launch`: what a training pod runs. Environment in, exit codes and signals out."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, TINY, environment, free_port

from bridle.cli import main
from bridle.ports import PORTS
from bridle.ports import free_port as port_to_meet_at

CONFIG = str(ROOT / "ds_configs/zero1.json")


def launch(*options: str, arguments: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bridle.cli", "launch", *options, "--", "--deepspeed_config", CONFIG, *arguments]
    return subprocess.Popen(
        command, env=environment(PET_MASTER_PORT=str(free_port()), **variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen[str], run: Path) -> list[int]:
    """Processes of the run, whoever their parents are."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, NotADirectoryError):
            continue
        if str(run).encode() in words and int(entry.name) != launcher.pid:
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        (["--nnodes", "two"], {}, "nnodes 'two': expected a whole number from 1; check --nnodes or PET_NNODES"),
        ([], {"PET_NNODES": "0"}, "nnodes '0': expected a whole number from 1; check --nnodes or PET_NNODES"),
        (["--nnodes", "2"], {}, "node_rank '': expected a whole number from 0; check --node-rank or PET_NODE_RANK"),
        (["--nnodes", "2"], {"PET_NODE_RANK": "2"}, "node_rank 2 of 2 nodes: expected 0 to 1; check --node-rank or"),
        (
            ["--nnodes=2", "--node-rank=0"],
            {},
            "2 nodes and no address of node 0; give --master-addr or PET_MASTER_ADDR",
        ),
        (["--master-port", "70000"], {}, "master_port 70000: expected 1 to 65535"),
        (["--nproc-per-node", "-1"], {}, "nproc_per_node '-1': expected a whole number from 1"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(
    options: list[str],
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["launch", "--nproc-per-node", "1", *options, "--", "--deepspeed_config", CONFIG]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bridle: error: {said}") and err.count("\n") == 1


def test_ranks_meet_at_a_port_that_is_free_and_that_no_system_hands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    free = port_to_meet_at()
    assert free in PORTS and PORTS.stop <= 32_768
    with socket.socket() as taken:
        taken.bind(("", port_to_meet_at()))
        taken.listen()
        busy = taken.getsockname()[1]
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *_: [busy, free])
        assert port_to_meet_at() == free
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *_: [busy])
        with pytest.raises(OSError, match="no free port among a hundred from 20000"):
            port_to_meet_at()


def test_a_name_that_nobody_has_is_waited_for_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--nnodes=2", "--node-rank=1", "--nproc-per-node=1", "--master-addr=nowhere.invalid"]
    assert main(["launch", *place, "--wait-for-master=1.5", "--", "--deepspeed_config", CONFIG]) == 1
    said = capsys.readouterr()
    assert said.out == "bridle launch: waiting for node 0, nowhere.invalid, to have a name\n"
    assert re.fullmatch(
        r"bridle: error: nowhere\.invalid: not known after 1\.5 s \(.+\); check --master-addr or PET_MASTER_ADDR, and"
        r" that node 0 was started\n", said.err,
    )  # fmt: skip


def test_a_signal_ends_the_wait_for_a_name() -> None:
    process = launch(
        "--nnodes=2", "--node-rank=1", "--nproc-per-node=1", "--master-addr=nowhere.invalid", "--wait-for-master=600"
    )
    assert process.stdout is not None and "waiting" in process.stdout.readline()
    process.terminate()
    assert process.wait(300) == 75


def test_a_batch_that_does_not_divide_over_the_ranks_is_exit_code_2(tmp_path: Path) -> None:
    run = ("--recipe", str(TINY), "--run", str(tmp_path / "run"), "train.batch_size=7")
    process = launch("--nproc-per-node", "2", arguments=run)
    out = process.communicate(timeout=300)[0]
    lines = [line for line in out.splitlines() if "error" in line]
    assert process.returncode == 2, out
    assert (
        lines == ["pretrain: error: train.batch_size 7 does not divide over 2 ranks; choose a multiple of 2"]
        and "Traceback" not in out
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_node_and_its_exit_code_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(
        arguments=("--recipe", str(TINY), "--run", str(run), "phases.1.steps=100000"), PET_NPROC_PER_NODE="2"
    )
    wait_for((run / "metrics.jsonl").exists, process)
    pids = sorted(ranks_of(process, run))
    os.kill(pids[-1], signal.SIGKILL)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 137 and "ended with SIGKILL; ending this node's others" in out, out
    assert not ranks_of(process, run)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.2)
