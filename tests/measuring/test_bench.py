"""`bridle bench` as somebody types it: the real step, its parts, its kernels, and ViTMAE's beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import BRIDLE, ROOT, TINY, environment
from warm import run_warm

from bridle.cli import main
from bridle.training.timing import PARTS


def test_a_step_is_measured_beside_the_machines_rate_and_vitmae(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["bench", str(TINY), "--micro-batch", "2", "--accumulation", "2", "--rounds", "1", "--json", str(figures)]
    done = run_warm([sys.executable, BRIDLE, *words], env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    found = json.loads(figures.read_text())
    assert [phase["phase"] for phase in found["phases"]] == ["1 encoder", "2 tokenizer", "3 encoder"]
    for phase in found["phases"]:
        assert f"phase {phase['phase']}" in printed
        assert phase["micro_batch"] == 2
        assert list(phase["parts"]) == list(PARTS)
        assert 0.5 < sum(phase["parts"].values()) <= 1.0
        assert phase["achieved"] == pytest.approx(phase["flops_per_clip"] * phase["clips_per_second"])
        assert phase["share"] == pytest.approx(phase["achieved"] / phase["best_product"])
        assert 0 < phase["reference"] < 2
        assert len(phase["kernels"]) == 10
        assert all(0 < share < 1 for _, share in phase["kernels"])


def test_what_cannot_be_measured_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--phase", "0"], f"--phase 0: {TINY} trains in phases [1, 2, 3]"),
    ):
        assert main(["bench", str(TINY), *words]) == 2
        assert said in capsys.readouterr().err
