"""Warnings that are not ours go to a file of the run."""

from __future__ import annotations

import subprocess

import pytest
import torch
from launching import ROOT, command, environment


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator is found here, so nobody warns that none is")
def test_a_librarys_warnings_stand_in_the_runs_log_and_not_on_the_screen(tmp_path):
    variables = {k: v for k, v in environment().items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(
        command(tmp_path / "run", "phases.1.steps=1", "phases.2.steps=1", "phases.3.steps=1"),
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    screen = done.stdout + done.stderr
    assert "accelerator" not in screen and "Warning" not in screen
    log = (tmp_path / "run" / "warnings.log").read_text()
    assert log.count("Setting accelerator to CPU") == 1
