"""`bridle export`, on a run that the real training program made."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from evaluation_inputs import write_pitches

import bridle
from bridle.cli import main


def test_export_writes_the_newest_finished_iteration(
    tiny_run: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    assert main(["export", str(tiny_run), str(target)]) == 0
    assert "iteration 2" in capsys.readouterr().out
    exported = bridle.load(target)
    assert exported.info["trained"]["iteration"] == 2
    during_training = bridle.load(tiny_run / "models" / "final")
    assert torch.equal(exported.tokenize(sound).codes, during_training.tokenize(sound).codes)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_a_model_can_be_read_by_whom_the_umask_lets(tiny_run: Path, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        assert main(["export", str(tiny_run), str(tmp_path / "model")]) == 0
    finally:
        os.umask(before)
    files = sorted((tmp_path / "model").iterdir())
    assert [file.name for file in files] == ["README.md", "config.json", "model.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_export_of_a_named_iteration_replaces_an_older_model(tiny_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert main(["export", str(tiny_run), str(target)]) == 0
    assert main(["export", str(tiny_run), str(target), "--iteration", "1"]) == 0
    exported = bridle.load(target)
    assert exported.info["trained"]["iteration"] == 1
    assert exported.info["tokenizer"] == "cold_start"


def test_export_refuses_to_overwrite_what_is_no_model(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "config.json").write_text("{}")
    (thesis / "chapter.txt").write_text("years of work")
    for target in (thesis, thesis / "chapter.txt"):
        assert main(["export", str(tiny_run), str(target)]) == 1
        assert "no model folder" in capsys.readouterr().err
    assert (thesis / "chapter.txt").read_text() == "years of work"


def test_export_of_what_is_not_there_says_what_is(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "model")
    assert main(["export", str(tiny_run), target, "--iteration", "3"]) == 2
    assert "iterations 1 to 2" in capsys.readouterr().err
    assert main(["export", str(tmp_path), target]) == 2
    assert "recipe.yaml" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints" / "phase-3-encoder")
    assert main(["export", str(run), target, "--iteration", "2"]) == 1
    assert "finished: 1" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "phase-1-encoder")
    assert main(["export", str(run), target]) == 1
    assert "no iteration is finished" in capsys.readouterr().err
    assert not Path(target).exists()


def test_an_exported_model_may_be_given_a_name(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_run), str(tmp_path / "model"), "--name", "birds-v2"]) == 0
    assert bridle.load(tmp_path / "model").info["name"] == "birds-v2"
    assert f"iteration 2 of {tiny_run} written to {tmp_path / 'model'} as 'birds-v2'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tiny_run), str(tmp_path / "other"), "--name", "../birds"])
    assert ended.value.code == 2 and "'../birds' is no name for a model" in capsys.readouterr().err


def test_the_card_has_the_runs_figures_and_the_probe_that_lies_beside_it(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run, target = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny_run, run)
    shards = str(write_pitches(tmp_path / "pitches.tar"))
    given = ["probe", str(run / "models" / "final"), shards, "--labels", "cls", "--folds", "2", "--workers", "0"]
    assert main([*given, "--out", str(run)]) == 0
    claims = [line for line in capsys.readouterr().out.splitlines() if " above " in line or " told apart " in line]
    assert claims and main(["export", str(run), str(target)]) == 0
    card = (target / "README.md").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["phase_index"] == 3 and row["split"] == "heldout"][-1]
    ecu = last["codebook_usage"][1] * math.log(last["codebook_perplexity"][1]) / math.log(64)
    cells = [last["accuracy"][1], last["position_accuracy"][1], last["codebook_majority"][1]]
    cells += [last["codebook_usage"][1], ecu, last["codebook_perplexity"][1]]
    assert "| 2 | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |" in card
    assert "| feature | linear | k-NN | paper |" in card and all(f"- {claim}" in card for claim in claims)
    assert main(["export", str(run), str(target), "--iteration", "1"]) == 0  # other weights than those probed
    card = (target / "README.md").read_text()
    assert "by position alone" in card and "Probes" not in card
    (run / "probe.json").write_text('{"model": 1}')
    assert main(["export", str(run), str(target)]) == 0
    assert "not what `bridle probe` writes" in caplog.text
    assert "Probes" not in (target / "README.md").read_text()
