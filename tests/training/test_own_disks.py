"""Nodes that share no disk: only rank 0 needs the run folder, the others get all they read from it over the group."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from halting import Halt
from launching import TINY, command, environment, pretrain, rows, variables_of
from warm import WarmProcess

NOWHERE = "/proc/no-folder-can-be-made-here/run"
"""The run folder of a rank that must neither read nor write one."""


class Node:
    """A rank, as its pod would start it: an environment and a working directory of its own, no launcher."""

    def __init__(
        self, where: str, folder: Path, config: str, variables: dict[str, str], halt: Halt | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder.with_suffix(".log")
        words, variables = command(Path(where), config=config), environment(**variables | {"LOCAL_RANK": "0"})
        if halt is not None:
            words, variables = halt.put_in(words, variables)
        with self.log.open("w") as output:
            self.process = WarmProcess(words, env=variables, cwd=folder, stdout=output, stderr=output)

    def ended(self) -> tuple[int, str]:
        return self.process.wait(timeout=400), self.log.read_text()


def start_nodes(run: Path, folder: Path, config: str, halt: Halt | None = None) -> list[Node]:
    places = zip((str(run), NOWHERE), variables_of(2), strict=True)
    return [
        Node(where, folder / f"node-{rank}", config, variables, halt) for rank, (where, variables) in enumerate(places)
    ]


def wait_for(what: Callable[[], object], nodes: list[Node]) -> None:
    deadline = time.monotonic() + 400
    while not what():
        assert time.monotonic() < deadline
        assert all(node.process.poll() is None for node in nodes), ended(nodes)
        time.sleep(0.02)


def ended(nodes: list[Node]) -> list[tuple[int, str]]:
    return [node.ended() for node in nodes]


@pytest.mark.slow
def test_a_run_over_two_disks_stops_goes_on_and_ends_as_one_on_a_shared_disk(tmp_path):
    config = "zero3"  # each rank's share of the moments is its own; test_zero.py has the other stages
    shared, run = tmp_path / "shared", tmp_path / "node-0" / "run"
    pretrain(shared, ranks=2, config=config)
    halt = Halt("[2 tokenizer] the end of step 5", tmp_path / "halt")
    nodes = start_nodes(run, tmp_path, config, halt)
    wait_for(halt.reached, nodes)
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping after this step" in nodes[0].log.read_text(), nodes)  # the other says nothing
    halt.end()
    assert [code for code, _ in ended(nodes)] == [75, 75]
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
