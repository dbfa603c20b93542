"""How many cores the doctor and the service take themselves to have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridle import cores
from bridle.cores import available_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_only_cores_that_the_process_may_run_on_count() -> None:
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    program += "from bridle.cores import available_cores; print(available_cores())"
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
