"""One rank of a node asks for every index; the others have what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launching import ROOT, environment, variables_of
from warm import run_warm


def opened(cache: Path) -> list[list]:
    """Of each of two ranks: its rank, how many headers it read, how many samples it has, and the hash of their data."""
    command = [sys.executable, str(Path(__file__).with_name("node_data_worker.py")), str(cache)]
    said = run_warm(command, env=environment(), cwd=ROOT, ranks=variables_of(2)).stdout
    return sorted(json.loads(line) for line in said.splitlines() if line.startswith("["))


def test_the_second_rank_of_a_node_reads_no_index(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "cache")
    assert first[1] > 0 and second[1] == 0
    assert first[2:] == second[2:] and first[2] > 100


def test_without_a_cache_that_can_be_written_each_rank_reads_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    first, second = opened(tmp_path / "file")
    assert first[1] == second[1] > 0
    assert first[2:] == second[2:]
