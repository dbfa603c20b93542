"""`bridle tune` tries the sizes that a run could have, and names the fastest that fits."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launching import BRIDLE, ROOT, TINY, environment
from warm import run_warm

from bridle.cli import main
from bridle.config import load_recipe
from bridle.measuring.tune import Trial, lengths, sizes


def test_sizes_are_tried_until_memory_ends_and_the_fastest_is_written(tmp_path: Path) -> None:
    line = tmp_path / "line"
    words = ["tune", str(TINY), "train.batch_size=12", "--ranks", "2", "--least", "3", "--rounds", "1"]
    done = run_warm([sys.executable, BRIDLE, *words, "--out", str(line)], env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row.split() for row in done.stdout.splitlines() if re.match(r"\s+\d", row)]
    assert [int(row[0]) for row in rows] == [3, 6]  # what divides 12 clips over 2 ranks
    whole = [12 / 2 * sum(1 / float(rate) for rate in row[1:4]) for row in rows]
    fastest = rows[whole.index(min(whole))][0]
    assert "largest that fits: 6, the whole batch" in done.stdout
    assert line.read_text() == f"train.micro_batch_size={fastest}\n"
    assert done.stdout.endswith(line.read_text())


def test_the_fastest_is_that_of_the_whole_recipe() -> None:
    recipe = load_recipe("audio")
    assert lengths(recipe) == [130.0, 30.0, 130.0]
    assert lengths(load_recipe("audio", ["phases.1.epochs=null", "phases.1.steps=5"])) == [1.0, 1.0, 1.0]
    assert sizes(recipe, 64, 1) == [1, 2, 4, 8, 16]
    quick_encoder, quick_tokenizer = Trial(8, [10.0, 1.0, 10.0], 0), Trial(16, [9.0, 100.0, 9.0], 0)
    assert quick_encoder.recipe_seconds([130, 30, 130]) > quick_tokenizer.recipe_seconds([130, 30, 130])
    assert quick_encoder.recipe_seconds([130, 1, 130]) < quick_tokenizer.recipe_seconds([130, 1, 130])


def test_what_cannot_be_tried_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--ranks", "3"], "train.batch_size 8 does not divide over 3 ranks"),
        (["--least", "9"], "--least 9: a rank has 8 clips a step"),
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
    ):
        assert main(["tune", str(TINY), *words]) == 2
        assert said in capsys.readouterr().err
