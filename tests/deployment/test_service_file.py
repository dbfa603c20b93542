"""examples/bridle-serve.service is one that systemd takes as it is, once the command is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import ROOT

INSTALLED = "/opt/bridle/bin/bridle"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_finds_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    unit = (ROOT / "examples/bridle-serve.service").read_text()
    assert unit.count(INSTALLED) == 1
    copy = tmp_path / "bridle-serve.service"
    copy.write_text(unit.replace(INSTALLED, str(Path(sys.executable).with_name("bridle"))))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "bridle-serve" in line]  # not of other units
    assert (done.returncode, said) == (0, [])
