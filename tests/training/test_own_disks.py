"""Nodes that share no disk: only rank 0 needs the run folder, the others get all they read from it over the group."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, TINY, environment, free_port, pretrain, rows

NOWHERE = "/proc/no-folder-can-be-made-here/run"
"""The run folder of a rank that must neither read nor write one."""


def start_nodes(run: Path, folder: Path, config: str) -> list[subprocess.Popen]:
    """Two ranks, as two pods would start them: an environment and a working directory each, no launcher."""
    port, nodes = str(free_port()), []
    for rank, where in enumerate((str(run), NOWHERE)):
        own = folder / f"node-{rank}"
        own.mkdir(exist_ok=True)
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "bridle/pretrain.py"), "--recipe", str(TINY), "--run", where]
        nodes.append(
            subprocess.Popen(
                [*command, "--deepspeed_config", str(ROOT / "ds_configs" / f"{config}.json")],
                env=environment(MASTER_ADDR="127.0.0.1", **variables),
                cwd=own,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return nodes


def ended(nodes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


@pytest.mark.slow
def test_a_run_over_two_disks_stops_goes_on_and_ends_as_one_on_a_shared_disk(tmp_path):
    config = "zero3"  # each rank's share of the moments is its own; test_zero.py has the other stages
    shared, run = tmp_path / "shared", tmp_path / "node-0" / "run"
    pretrain(shared, ranks=2, config=config)
    nodes = start_nodes(run, tmp_path, config)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/phase-2-tokenizer").is_dir():
        assert time.monotonic() < deadline
        assert all(node.poll() is None for node in nodes), ended(nodes)
        time.sleep(0.05)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert all(code in (0, 75) for code, _ in ended(nodes))
    assert not (run / "models/final").exists()
    for code, output in ended(start_nodes(run, tmp_path, config)):
        assert code == 0, output
    assert rows(run) == rows(shared)
    assert (run / "models/final/model.safetensors").read_bytes() == (
        shared / "models/final/model.safetensors"
    ).read_bytes()
    assert list((tmp_path / "node-1").iterdir()) == []


@pytest.mark.slow
def test_what_stops_rank_0_at_the_start_stops_all(tmp_path):
    """Another recipe than the folder's, which only rank 0 can see: each ends with code 2, and nobody waits."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(TINY.read_text().replace("steps: 10", "steps: 11"))
    (first, said), (second, heard) = ended(start_nodes(run, tmp_path, "zero2"))
    assert (first, second) == (2, 2), said + heard
    for output in (said, heard):
        assert output.count("phases.1.steps") == 1
        assert "Traceback" not in output
