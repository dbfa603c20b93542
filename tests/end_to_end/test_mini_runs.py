"""The shipped mini recipes, by the literal command on two processes: they learn, and what they leave can be used."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, command, environment, rows

from bridle.cli import main
from bridle.model_folder import load

ALL = ("audio", "image", "video")


@pytest.fixture(scope="module", params=ALL)
def mini(request, tmp_path_factory) -> tuple[str, Path]:
    run = tmp_path_factory.mktemp(request.param) / "run"
    arguments = ["--recipe", f"{request.param}-mini", "train.prometheus_port=0"]
    done = subprocess.run(
        command(run, *arguments, ranks=2),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return request.param, run


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_mini_run_learns_and_uses_its_codebooks(mini, tmp_path, capsys):
    modality, run = mini
    size = 32
    last = {(row["phase_index"], row["split"]): row for row in rows(run)}
    first = next(row for row in rows(run) if row["phase"] == "tokenizer")
    for phase in (1, 3):
        trained, heldout = last[phase, "train"], last[phase, "heldout"]
        accuracy, majority = heldout["accuracy"], heldout["codebook_majority"]
        assert sum(trained["loss_per_codebook"]) < 0.85 * 4 * math.log(size)
        assert sum(heldout["loss_per_codebook"]) < 0.85 * 4 * math.log(size)
        # The control is who always guesses the most frequent code of these very clips. Later codebooks hold what the
        # first ones leave over, and how much of that is learned in minutes hangs on the machine: their sum counts.
        assert sum(accuracy) > 1.1 * sum(majority), (accuracy, majority)
        assert accuracy[0] > 1.2 * majority[0], (accuracy, majority)
    assert first["cosine"] < 0.5
    assert last[2, "heldout"]["cosine"] > 0.8

    assert main(["codebooks", str(run / "models/final"), f"builtin:{modality}", "--out", str(tmp_path)]) == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())
    rates = [codebook["cur"] for codebook in figures["per_codebook"]]
    assert min(rates) > 0.9, rates


@pytest.mark.slow
def test_a_clip_has_the_same_codes_alone_in_a_batch_from_a_file_and_from_the_command_line(mini, tmp_path, capsys):
    import torch

    from bridle.data.shards import open_shards

    modality, run = mini
    model = load(run / "models/final")
    shards = open_shards([f"builtin:{modality}-heldout"], extensions=model.modality.extensions)
    samples = [shards.read(i) for i in range(min(8, len(shards)))]
    windows = [next(iter(model.modality.windows(sample.data))) for sample in samples]
    together = model.codes(torch.stack([window.values for window in windows]))
    file = tmp_path / f"clip.{samples[0].extension}"
    file.write_bytes(samples[0].data)
    for window, codes in zip(windows, together, strict=True):
        assert torch.equal(model.codes(window.values[None])[0], codes)
    from_file = model.tokenize(file)
    assert torch.equal(from_file.codes, model.tokenize(samples[0].data).codes)
    kept = min(len(from_file.codes), len(together[0]))
    assert torch.equal(from_file.codes[:kept], together[0][:kept])
    capsys.readouterr()
    assert main(["tokenize", str(run / "models/final"), str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["codes"] == from_file.codes.T.tolist()
    assert printed["grid"] == from_file.grid


@pytest.mark.slow
def test_the_frozen_tokenizer_of_iteration_1_is_the_cold_start(mini):
    _, run = mini
    assert load(run / "models/iteration-1").info["tokenizer"] == "cold_start"
    assert load(run / "models/iteration-2").info["tokenizer"] == "learned"


def test_the_door_explains_itself():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bridle/pretrain.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    for word in ("--deepspeed_config", "--recipe", "--data", "--run", "dotted.key=value"):
        assert word in done.stdout
