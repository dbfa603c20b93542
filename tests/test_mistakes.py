"""Whose fault an error is, at the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridle.cli import report_mistakes
from bridle.modalities.clip import UndecodableError
from bridle.settings import RecipeError


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bridle.cli", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
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
    assert report_mistakes("bridle", broken) == 70
    told = capsys.readouterr().err
    assert "internal error: KeyError" in told and "--traceback" in told and "Traceback (most" not in told
    assert report_mistakes("pretrain", broken) == 70  # whose log is read afterwards
    assert "Traceback (most" in capsys.readouterr().err
    monkeypatch.setenv("BRIDLE_TRACEBACK", "1")
    for program in ("bridle", "pretrain"):
        assert report_mistakes(program, broken) == 70
        assert capsys.readouterr().err.count("Traceback (most") == 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("of ours"), 70, "internal error: ValueError: of ours"),
        (RecipeError("of a recipe"), 2, "error: of a recipe"),
        (UndecodableError("of a file"), 1, "error: of a file"),
        (OSError("of a disk"), 1, "error: of a disk"),
    ],
)
def test_the_exit_code_tells_whose_fault_it_is(
    error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> int:
        raise error

    monkeypatch.delenv("BRIDLE_TRACEBACK", raising=False)
    assert report_mistakes("bridle", failing) == code
    assert capsys.readouterr().err.startswith(f"bridle: {told}")
