"""What goes wrong in a run costs one clear line, and nothing that was good."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from launching import ROOT, command, environment, pretrain, rows

from bridle.config import load_recipe
from bridle.modalities import build_modality
from bridle.settings import RecipeError
from bridle.training.fits import check_recipe


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def sounds(count: int) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {f"good{i:02d}.wav": wav(rng.standard_normal(8000).astype(np.float32) * 0.1) for i in range(count)}


def failed(done, code: int = 1) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    assert "none-*.tar" in failed(pretrain(tmp_path / "run", "--data", str(tmp_path / "none-*.tar"), check=False))


def test_settings_that_do_not_fit_each_other_are_found_before_anything_is_written(tmp_path):
    line = failed(pretrain(tmp_path / "run", "mask.kind=tube", check=False), code=2)
    assert "mask.kind tube needs a grid of time, height and width; this one is (" in line
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("video-mini", ["model.decoder.kind=swin"], "model.decoder.kind swin needs clips with a grid of two axes"),
        ("image-mini", ["mask.kind=tube"], "mask.kind tube needs a grid of time"),
        ("video-mini", ["mask.kind=time_frequency"], "mask.kind time_frequency needs a grid of two axes"),
        ("image-mini", ["mask.ratio=0.001"], "mask.ratio 0.001 hides 0 of"),
        ("video-mini", ["model.encoder.width=4", "model.encoder.heads=1"], "model.encoder.width = 4: expected 6"),
        ("audio-mini", ["model.decoder.width=2", "model.decoder.heads=1"], "model.decoder.width = 2: expected 4"),
        ("image-mini", ["clip.size=[33, 32]"], r"size \(33, 32\) is not a multiple of patch"),
        ("audio-mini", ["clip.mel_bins=100"], "patch 16 does not divide mel_bins 100"),
    ],
)
def test_each_part_that_does_not_fit_is_named_by_its_field(recipe, changes, said):
    with pytest.raises(RecipeError, match=said):
        found = load_recipe(recipe, changes)
        check_recipe(found, tuple(build_modality(found.modality, found.clip).grid.values()))


def test_a_truncated_tar_is_named(tmp_path):
    tar = tar_of(tmp_path / "cut.tar", sounds(6))
    tar.write_bytes(tar.read_bytes()[:40_000])
    assert "cut.tar" in failed(pretrain(tmp_path / "run", "--data", str(tar), check=False))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_corrupt_samples_are_replaced_counted_named_and_stop_the_run_when_too_many(tmp_path):
    bad = {
        "broken.flac": b"fLaC" + b"\0" * 400,
        "empty.wav": wav(np.zeros(0, np.float32)),
        "nan.wav": wav(np.full(8000, np.nan, np.float32)),
    }
    tar = tar_of(tmp_path / "mixed.tar", {**sounds(13), **bad})
    done = pretrain(tmp_path / "tolerant", "--data", str(tar), "data.max_corrupt=0.5")
    for key in ("broken", "empty", "nan"):
        assert f"key {key}" in done.stdout
    assert rows(tmp_path / "tolerant")[-1]["corrupt"] > 0
    line = failed(pretrain(tmp_path / "strict", "--data", str(tar), "data.max_corrupt=0.05", check=False))
    assert "data.max_corrupt" in line
    one = tar_of(tmp_path / "one.tar", {**sounds(13), "empty.wav": bad["empty.wav"]})
    short = ["phases=[{kind: cold_start}, {kind: encoder, steps: 2, lr: 1.0e-3}]", "--data", str(one)]
    pretrain(tmp_path / "one", *short, "data.max_corrupt=0.001")
    assert rows(tmp_path / "one")[-1]["corrupt"] == 1
    assert "1 of 16 samples" in failed(pretrain(tmp_path / "none", *short, "data.max_corrupt=0", check=False))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks_and_keeps_the_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    pretrain(
        run,
        "phases.1.steps=8",
        "phases.2.lr=1e30",
        "phases.2.steps=20",
        "phases.2.warmup_steps=8",
        ranks=2,
        check=False,
    )
    done = pretrain(
        run, "phases.1.steps=8", "phases.2.lr=1e30", "phases.2.steps=20", "phases.2.warmup_steps=8", check=False
    )
    assert "not finite" in failed(done)
    assert (run / "models/iteration-1/config.json").is_file()
    assert all(np.isfinite(row["loss"]) for row in rows(run))


@pytest.mark.slow
def test_a_full_disk_costs_one_line_and_no_checkpoint(tmp_path):
    run = tmp_path / "run"
    pretrain(run, "phases.1.steps=4", "phases.2.steps=4", "phases.3.steps=4")
    kept = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    other = tmp_path / "other"
    limited = subprocess.run(
        command(other, "phases.1.steps=4", "phases.2.steps=4", "phases.3.steps=4"),
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )  # fmt: skip
    line = failed(limited)
    assert "cannot write" in line
    assert not list(other.rglob("*.partial"))
    pretrain(other, "phases.1.steps=4", "phases.2.steps=4", "phases.3.steps=4")
    for path, data in kept.items():
        assert (other / path.relative_to(run)).read_bytes() == data


@pytest.mark.slow
def test_nothing_needs_a_compiler(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python", "ninja"):
        (tools / name).symlink_to(Path(sys.executable).with_name(name))
    done = subprocess.run(
        command(tmp_path / "run", "phases.1.steps=2", "phases.2.steps=2", "phases.3.steps=2"),
        env={**environment(PATH=str(tools), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")), "CC": "", "CXX": ""},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "extensions").exists() or not os.listdir(tmp_path / "extensions")  # noqa: PTH208
