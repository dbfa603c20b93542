"""examples/slurm.sh with stand-ins for the two commands that it uses: one node, warned before its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import ROOT, TINY, environment

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
echo $$ > "$NOTES/task"
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" > "$NOTES/requeued" ;;
esac
"""


def test_a_run_that_slurm_warns_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "NOTES": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[1]", "SLURM_JOB_ID": str(os.getpid()),
        "PET_NPROC_PER_NODE": "1", "CONFIG": "builtin:zero1",
    }  # fmt: skip
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as out:
        job = subprocess.Popen(
            ["bash", ROOT / "examples/slurm.sh", "--recipe", TINY, "--run", run, "phases.1.steps=100000"],
            env=environment(**variables), cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    end = time.monotonic() + 240
    while "[1 encoder] step 2/" not in log.read_text():
        assert job.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    assert job.wait(300) == 75, log.read_text()
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    assert list(run.glob("checkpoints/phase-1-encoder/step-*/state.json"))
