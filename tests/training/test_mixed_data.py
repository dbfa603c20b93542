"""A run on several weighted sources, through the command line."""

from __future__ import annotations

import math
import signal

import pytest
import yaml
from launching import pretrain, rows, start_and_signal

from bridle.data.shards import open_shards
from bridle.modalities import build_modality

MIX = ("--data", "builtin:audio@0.5", "builtin:audio-heldout@2")
PHASES = "phases=[{kind: cold_start}, {kind: encoder, epochs: 1, warmup_steps: 2, lr: 1.0e-3}]"


@pytest.mark.slow
def test_a_mixed_run_lasts_its_epochs_resumes_exactly_and_keeps_its_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain(whole, *MIX, PHASES)
    sources = yaml.safe_load((whole / "recipe.yaml").read_text())["data"]["sources"]
    assert [(source["shards"], source["weight"]) for source in sources] == [
        (["builtin:audio"], 0.5),
        (["builtin:audio-heldout"], 2.0),
    ]
    extensions = build_modality("audio", {}).extensions
    half, twice = (
        len(open_shards([name], extensions=extensions)) for name in ("builtin:audio", "builtin:audio-heldout")
    )
    steps = math.ceil((half / 2 + 2 * twice) / 8)
    assert rows(whole)[-1]["step"] == steps and rows(whole)[-1]["samples"] == 8 * steps
    code, output = start_and_signal(killed, 3, signal.SIGKILL, *MIX, PHASES)
    assert code == -signal.SIGKILL, output
    pretrain(killed, *MIX, PHASES)
    assert rows(killed) == rows(whole)
    model = "models/final/model.safetensors"
    assert (killed / model).read_bytes() == (whole / model).read_bytes()
    refused = pretrain(killed, "--data", "builtin:audio@0.5", "builtin:audio-heldout@3", PHASES, check=False)
    assert refused.returncode == 2 and "data.sources.1.weight: 2.0 there, 3.0 now" in refused.stderr + refused.stdout


@pytest.mark.slow
def test_a_bad_mixture_is_one_line_before_anything_is_written(tmp_path):
    bad = pretrain(tmp_path / "run", "--data", "builtin:audio", "builtin:audio-heldout@much", check=False)
    assert bad.returncode == 2
    assert (
        "weight 'much' is not a number from 0.001 to 1000" in bad.stderr + bad.stdout and "Traceback" not in bad.stderr
    )
    empty = pretrain(tmp_path / "run", "--data", "builtin:audio@2", "none/*.tar@1", check=False)
    assert empty.returncode == 1
    assert "shards 'none/*.tar': matches nothing" in empty.stderr + empty.stdout and "Traceback" not in empty.stderr
    assert not (tmp_path / "run").exists()
