"""The shipped mini recipes, sound's by the literal command on two processes: they learn, and what they leave works.

Each is cut to a fifth of its steps: enough for what it learns to stand clear of its controls, measured in the same run.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, command, environment, rows

from bridle.cli import main
from bridle.data.shards import open_shards
from bridle.model import batched
from bridle.model_folder import load, stacked

ALL = ("audio", "image", "video")
SHORT = [
    "phases.1.steps=300", "phases.2.steps=150", "phases.3.steps=100", "phases.1.warmup_steps=30",
    "phases.2.warmup_steps=20", "phases.3.warmup_steps=20", "train.checkpoint_every=1000", "train.prometheus_port=0",
]  # fmt: skip


@pytest.fixture(scope="module", params=ALL)
def mini(request, tmp_path_factory) -> tuple[str, Path]:
    run = tmp_path_factory.mktemp(request.param) / "run"
    arguments = ["--recipe", f"{request.param}-mini", *SHORT]
    done = subprocess.run(
        command(run, *arguments, ranks=2 if request.param == "audio" else 1),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return request.param, run


def told_of_heldout_clips(run: Path, modality: str) -> list[float]:
    """R^2 of the teacher's embeddings on codes, the projection's and learned ones, by a linear reader that was fitted
    on clips of the training data: the few films held out would fit none."""
    cold, learned = load(run / "models/iteration-1"), load(run / "models/iteration-2")
    found = []
    for split in ("", "-heldout"):
        shards = open_shards([f"builtin:{modality}{split}"], extensions=cold.modality.extensions)
        clips = [next(iter(cold.modality.windows(shards.data(i)))) for i in range(min(100, len(shards)))]
        parts = []
        for some in batched(clips, 16):
            values, valid = stacked(some)
            answers = cold.embed(values, valid), cold.codes(values, valid), learned.codes(values, valid)
            parts += [[answer[row, :count] for answer in answers] for row, count in enumerate(valid)]
        found.append([torch.cat(part).numpy() for part in zip(*parts, strict=True)])
    (teacher, *codes), (heldout, *heldout_codes) = found
    scores = []
    for fitted, tested in zip(codes, heldout_codes, strict=True):
        design, new = (np.eye(32)[each].reshape(len(each), -1) for each in (fitted, tested))
        weights = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T @ (teacher - teacher.mean(0)))
        errors, total = heldout - teacher.mean(0) - new @ weights, heldout - teacher.mean(0)
        scores.append(1 - float(np.square(errors).sum() / np.square(total).sum()))
    return scores


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_mini_run_learns_more_than_its_controls_know(mini, tmp_path, capsys):
    modality, run = mini
    last = {(row["phase_index"], row["split"]): row for row in rows(run)}
    for phase in (1, 3):  # against who knows a patch's position, or the most frequent code, and nothing of the clip
        heldout = last[phase, "heldout"]
        for control in ("position_accuracy", "codebook_majority"):
            assert sum(heldout["accuracy"]) > 1.05 * sum(heldout[control]), (control, heldout)
        assert sum(heldout["loss_per_codebook"]) < 0.9 * 4 * math.log(32), heldout
    tokenizer = last[2, "heldout"]
    projection, learned = told_of_heldout_clips(run, modality)
    assert learned > projection + 0.05
    assert tokenizer["r2"] > tokenizer["r2_cold_start"], tokenizer  # the same of the row, fitted on held-out clips
    assert tokenizer["cosine"] > tokenizer["mean_cosine"] + 0.1, tokenizer  # the mean embedding at the position
    assert tokenizer["participation_ratio"] > 2.5, tokenizer
    assert tokenizer["healthy"] is True and last[1, "heldout"]["healthy"] is True

    assert main(["codebooks", str(run / "models/final"), f"builtin:{modality}", "--out", str(tmp_path)]) == 0
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())
    rates = [codebook["cur"] for codebook in figures["per_codebook"]]
    assert min(rates) > 0.5, rates


@pytest.mark.slow
def test_a_clip_has_the_same_codes_alone_in_a_batch_from_a_file_and_from_the_command_line(mini, tmp_path, capsys):
    modality, run = mini
    model = load(run / "models/final")
    shards = open_shards([f"builtin:{modality}-heldout"], extensions=model.modality.extensions)
    samples = [shards.read(i) for i in range(min(8, len(shards)))]
    windows = [next(iter(model.modality.windows(sample.data))) for sample in samples]
    together = model.codes(*stacked(windows))
    file = tmp_path / f"clip.{samples[0].extension}"
    file.write_bytes(samples[0].data)
    for window, codes in zip(windows, together, strict=True):
        assert torch.equal(model.codes(*stacked([window]))[0, : window.positions], codes[: window.positions])
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
