"""How many cores the service takes itself to have, and how its model processes share them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving import cores
from serving.cores import CALM_SECONDS, SharedCores, available_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_only_cores_that_the_process_may_run_on_count() -> None:
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    program += "from serving.cores import available_cores; print(available_cores())"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("6400000 100000", 8), ("", 8), (None, 8)],
)
def test_a_containers_cpu_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, expected: int
) -> None:
    quota = tmp_path / "cpu.max"
    if limit is not None:
        quota.write_text(limit)
    monkeypatch.setattr(cores, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert available_cores() == expected


def test_a_batch_alone_gets_all_cores_and_batches_beside_each_other_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    monkeypatch.setattr(cores.time, "monotonic", lambda: now)
    shared = SharedCores(processes=2, threads=0)
    assert shared.take(more=False) == 8
    assert shared.take(more=False) == 4  # beside the first
    shared.give_back()
    shared.give_back()
    assert shared.take(more=False) == 4  # others were here a moment ago
    shared.give_back()
    now += CALM_SECONDS + 0.01
    assert shared.take(more=False) == 8
    shared.give_back()
    assert shared.take(more=True) == 4
    assert SharedCores(processes=16, threads=0).take(more=True) == 1
    fixed = SharedCores(processes=2, threads=3)
    assert [fixed.take(more=False), fixed.take(more=True)] == [3, 3]
