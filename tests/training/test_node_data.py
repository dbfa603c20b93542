"""One rank of a node asks for every index; the others have what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launching import ROOT, environment, free_port


def opened(cache: Path) -> list[list]:
    """Of each of two ranks: its rank, how many headers it read, how many samples it has, and the hash of their data."""
    command = [sys.executable, str(Path(__file__).with_name("node_data_worker.py")), str(cache)]
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in ranks]
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_the_second_rank_of_a_node_reads_no_index(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "cache")
    assert first[1] > 0 and second[1] == 0
    assert first[2:] == second[2:] and first[2] > 100


def test_without_a_cache_that_can_be_written_each_rank_reads_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    first, second = opened(tmp_path / "file")
    assert first[1] == second[1] > 0
    assert first[2:] == second[2:]
