"""A run never waits in silence: whoever is missing is named, with what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, command, environment, output_of, start, start_bare, wait_for_rows

from bridle.training.checkpoints import PhaseCheckpoints, Position
from bridle.training.keeper import Keeper
from bridle.training.ranks import Ranks
from bridle.training.rendezvous import PATIENCE

ENDLESS = ("phases.1.steps=50000", "train.checkpoint_every=2", "train.collective_timeout=10")


def error_of(run: Path) -> str:
    assert "Traceback" not in output_of(run), output_of(run)
    lines = [line for line in output_of(run).splitlines() if line.startswith("pretrain: error:")]
    assert lines, output_of(run)
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0])
def test_a_rank_that_hangs_is_named_and_the_others_leave_their_stacks_and_end(tmp_path, stopped):
    run = tmp_path / "run"
    ranks = start_bare(run, *ENDLESS)
    try:
        wait_for_rows(run, 2, ranks[0])
        ranks[stopped].send_signal(signal.SIGSTOP)
        assert ranks[1 - stopped].wait(timeout=300) == 1
        error = error_of(run)
        assert f"rank {stopped} did not arrive and did not answer" in error
        assert "train.collective_timeout" in error
        stacks = (run / "stacks" / f"rank-{1 - stopped}.txt").read_text()
        assert "thread MainThread:" in stacks
        assert "loop.py" in stacks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


SLOW_RANK = """
import sys, threading, time
from bridle import pretrain
from bridle.training import loop
step = loop.PhaseRun.step
def sleepy(self, *given):
    if self.ranks.rank == 1 and self.index == 1:
        time.sleep(3600)
    return step(self, *given)
loop.PhaseRun.step = sleepy
sys.exit(pretrain.main())
"""


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_own_code_is_told_from_those_that_wait_for_it(tmp_path):
    """Its main thread sleeps, so that it can still answer; the stacks of both are written."""
    run, sleepy = tmp_path / "run", tmp_path / "sleepy.py"
    sleepy.write_text(SLOW_RANK)
    ranks = start_bare(run, *ENDLESS, program=str(sleepy))
    assert [rank.wait(timeout=300) for rank in ranks] == [1, 1]
    assert "rank 1 did not arrive: at '[1 encoder]" in error_of(run)
    assert "sleepy" in (run / "stacks" / "rank-1.txt").read_text()
    assert "sleepy" not in (run / "stacks" / "rank-0.txt").read_text().partition("step(self")[2]
    assert not (run / "lock.json").exists()


@pytest.mark.slow
def test_addresses_that_lead_nowhere_name_the_variable_within_a_minute(tmp_path):
    cases = {
        "unknown": {"RANK": "0", "MASTER_ADDR": "no-such-host.invalid"},
        "itself": {"RANK": "1", "MASTER_ADDR": "127.0.0.1"},
    }
    nonsense = start_bare(tmp_path / "nonsense", GLOO_SOCKET_IFNAME="nonsense")
    started = {
        name: start(tmp_path / name, WORLD_SIZE="2", MASTER_PORT="29999", **given) for name, given in cases.items()
    }
    for name, process in started.items():
        code, errors = process.wait(timeout=400), output_of(tmp_path / name)
        assert code == 1, errors
        assert f"MASTER_ADDR={cases[name]['MASTER_ADDR']}" in errors
        assert "set MASTER_ADDR to the name or address of rank 0's machine" in errors
    assert [rank.wait(timeout=300) for rank in nonsense] == [1, 1]
    assert "GLOO_SOCKET_IFNAME=nonsense: no such interface" in error_of(tmp_path / "nonsense")
    assert PATIENCE < 50  # the clock of a busy machine's imports is no measure


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them; a host name of a machine leads to its loopback."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("NO NETWORK NAMESPACES: needs root and iproute2; nothing was tested")
    names = [f"bridle-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"NO NETWORK NAMESPACES: {error.stderr.decode().strip()}; nothing was tested")
    try:
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
            ip("-n", name, "link", "set", f"cable{i}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interfaces", "said"),
    [
        (("", ""), "where no other machine reaches it; set GLOO_SOCKET_IFNAME"),
        (("cable0", "blind1"), "cannot reach rank 1 on"),
    ],
)
def test_gloo_on_an_interface_that_no_peer_reaches_names_the_variable(tmp_path, two_machines, interfaces, said):
    ip("-n", two_machines[1], "link", "add", "blind1", "type", "veth", "peer", "name", "blind2")
    ip("-n", two_machines[1], "address", "add", "10.88.0.1/24", "dev", "blind1")
    ip("-n", two_machines[1], "link", "set", "blind1", "up")
    ranks = []
    for rank, name in enumerate(two_machines):
        given = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
        given |= {"GLOO_SOCKET_IFNAME": interfaces[rank]} if interfaces[rank] else {}
        ranks.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command(tmp_path / "run", "train.collective_timeout=20")],
                env=environment(**given), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    assert any(said in output for output in outputs), outputs
    assert all("GLOO_SOCKET_IFNAME" in output or "rank 1" in output for output in outputs), outputs
    assert not (tmp_path / "run").exists()


def test_who_waits_for_its_own_disk_or_store_says_that_it_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr("bridle.training.ranks.REASSURE", 0.01)
    heard, told = threading.Event(), []
    keeper = Keeper(Ranks(0, 1, torch.device("cpu"), when_well=[heard.set]), push=lambda: told.append(heard.wait(60)))
    keeper.deliver()
    heard.clear()
    keeper.start("a checkpoint", lambda: told.append(heard.wait(60)))
    engine = SimpleNamespace(module=torch.nn.Linear(1, 1).requires_grad_(False))
    PhaseCheckpoints(tmp_path, 1, "encoder").save(engine, Position(step=1), keeper)
    keeper.close()
    assert told[:2] == [True, True]
