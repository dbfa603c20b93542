"""The example, from a folder of sounds to a language model: the stream that bulk work writes is learnable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridle.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_causal_transformer_learns_the_codes_of_sounds(models: dict[str, Path], tmp_path: Path) -> None:
    """Untrained as the encoder is, its codes follow the sound: the control is what position and frequency tell."""
    for name in ("audio", "audio-heldout"):
        command = ["tokenize", str(models["audio"]), f"builtin:{name}", "--out", str(tmp_path / name), "--workers", "0"]
        assert main(command) == 0
    assert main(["pack", str(tmp_path / "audio"), "--length", "192", "--out", str(tmp_path / "packed")]) == 0
    script = [sys.executable, "examples/llm_from_tokens.py", str(tmp_path / "packed"), str(tmp_path / "audio-heldout")]
    done = subprocess.run(
        [*script, "--out", str(tmp_path / "llm"), "--steps", "100"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "llm" / "figures.json").read_text())
    assert figures["perplexity"] < 0.7 * figures["unigram_given_position"] <= figures["unigram"]
    assert figures["share_in_layout"] > 0.99
    assert figures["generated_codes"] > 0
