"""Whose fault an error is, at the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridle.cli import report_mistakes


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bridle.cli", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_mistake_is_one_line_and_its_traceback_is_shown_on_request(tmp_path: Path) -> None:
    wrong = ("export", str(tmp_path / "none"), str(tmp_path / "model"))
    plain = run(*wrong)
    assert plain.returncode in (1, 2)
    assert "Traceback" not in plain.stderr and plain.stderr.count("\n") == 1
    for shown in (run("--traceback", *wrong), run(*wrong, "--traceback"), run(*wrong, BRIDLE_TRACEBACK="1")):
        assert shown.returncode == plain.returncode
        assert "Traceback" in shown.stderr and plain.stderr in shown.stderr
    assert "Traceback" not in run(*wrong, BRIDLE_TRACEBACK="0").stderr


def test_a_fault_of_ours_is_not_told_as_a_users(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> int:
        raise KeyError("a bug")

    monkeypatch.delenv("BRIDLE_TRACEBACK", raising=False)
    assert report_mistakes("bridle", broken) == 1
    told = capsys.readouterr().err
    assert "internal error: KeyError" in told and "--traceback" in told and "Traceback (most" not in told
    monkeypatch.setenv("BRIDLE_TRACEBACK", "1")
    assert report_mistakes("bridle", broken) == 1
    assert "Traceback (most" in capsys.readouterr().err
