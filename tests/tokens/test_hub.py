"""Model folders go to the Hugging Face hub and come back, and transformers' Auto classes load them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_inputs import sample_media, write_model
from hub_server import Hub

import bridle
from bridle.cli import main
from bridle.model_folder import ModelError

SCRIPT = """
import json, sys, logging
import bridle
from bridle.hub import HubError
logging.basicConfig(level=logging.WARNING)
one, two, sound = sys.argv[1:]
first = bridle.load(one).push_to_hub("someone/tiny", licence="cc0-1.0")
second = bridle.load(two).push_to_hub("someone/tiny")
found = {"commits": [first, second]}
for name, source, revision in [("newest", "someone/tiny", None), ("pinned", "someone/tiny", first),
                               ("at", f"hf://someone/tiny@{first}", None)]:
    model = bridle.load(source, revision=revision)
    found[name] = [model.sha256, model.config.licence, model.tokenize(sound).codes.tolist()]
for name, source, revision in [("nobody", "nobody/none", None), ("unknown", "someone/tiny", "0" * 40)]:
    try:
        bridle.load(source, revision=revision)
    except HubError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_a_model_is_published_fetched_and_pinned(hub: Hub, models: dict[str, Path], tmp_path: Path) -> None:
    sound = tmp_path / "sound.flac"
    sound.write_bytes(sample_media("audio", 1)[0][1])
    other = write_model(tmp_path / "other", "audio", seed=1)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", SCRIPT, str(models["audio"]), str(other), str(sound)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, two = bridle.load(models["audio"]), bridle.load(other)
    assert found["newest"] == [two.sha256, None, two.tokenize(sound).codes.tolist()]
    assert found["pinned"] == found["at"] == [one.sha256, "cc0-1.0", one.tokenize(sound).codes.tolist()]
    assert f"pin it with someone/tiny@{found['commits'][1]}" in done.stderr
    assert "hub says" in found["nobody"]
    assert "hub says" in found["unknown"]
    assert set(hub.commits["someone/tiny"][0][1]) == {"config.json", "model.safetensors", "README.md"}


def test_shards_on_the_hub_are_found_and_indexed(hub: Hub, sounds: list[Path], tmp_path: Path) -> None:
    files = {f"train/{path.name}": path.read_bytes() for path in sounds}
    hub.commits["someone/shards"] = [("a" * 40, {**files, "README.md": b"about"})]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "bridle.cli", "shards", "index", "--cache", str(tmp_path / "cache")]
    for pattern, code in (("hf://someone/shards/train/*.tar", 0), ("hf://someone/shards/train/none.tar", 2)):
        done = subprocess.run(
            [*command, pattern], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, done.stderr
        found = [line.partition(" bytes")[0] for line in done.stdout.splitlines()]
        counts = zip(sounds, (5, 3, 4), strict=True)
        expected = [f"hf://someone/shards/train/{p.name}: {n} samples, {p.stat().st_size}" for p, n in counts]
        assert found == (expected if code == 0 else [])
    assert "hf://someone/shards/train/none.tar: not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_transformers_auto_classes_load_a_model_folder(models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    import bridle.hf

    plain = bridle.load(models["audio"])
    model = transformers.AutoModel.from_pretrained(models["audio"])
    assert isinstance(model, bridle.hf.BridleAutoModel)
    assert transformers.AutoConfig.from_pretrained(models["audio"]).name == plain.config.name
    clips = list(plain.modality.windows(sample_media("audio", 1)[0][1]))
    values = torch.stack([clip.values for clip in clips])
    found = model(values)
    np.testing.assert_array_equal(found.codes, plain.codes(values))
    torch.testing.assert_close(found.last_hidden_state, plain.embed(values))
    model.save_pretrained(tmp_path / "again", licence="mit")
    again = bridle.load(tmp_path / "again")
    assert (again.sha256, again.config.licence) == (plain.sha256, "mit")
    with pytest.raises(ModelError, match="load it in float32"):
        bridle.load(models["audio"], dtype="bfloat16").save_pretrained(tmp_path / "half")


def test_the_card_says_what_is_known(tmp_path: Path, models: dict[str, Path]) -> None:
    model = bridle.load(models["audio"])
    figures = {"accuracy": [0.51234567, 0.4], "position_accuracy": [0.3, 0.2], "loss": 1.25, "verdict": "all is well"}
    scores = {"codes (depth 1)": {"linear": "0.700 [0.600, 0.800]"}}
    probe = {"sha256": model.sha256, "about": "accuracy", "scores": scores, "verdicts": ["above"]}
    model.config.trained.update(steps=10, data=["shards/*.tar"], figures=figures, probe=probe)
    model.save_pretrained(tmp_path / "m", licence="cc-by-4.0")
    card = (tmp_path / "m" / "README.md").read_text()
    for said in (
        "license: cc-by-4.0", "steps 10", "`shards/*.tar`", "| codebook | accuracy | by position alone |",
        "| 1 | 0.5123 | 0.3 |", "| 2 | 0.4 | 0.2 |", "| loss | 1.25 |", "all is well.",
        "| codes (depth 1) | 0.700 [0.600, 0.800] |", "- above",
    ):  # fmt: skip
        assert said in card
    model.config.trained["probe"]["sha256"] = "0" * 64
    model.save_pretrained(tmp_path / "m")
    assert "Probes" not in (tmp_path / "m" / "README.md").read_text()


def test_a_path_that_is_not_there_never_asks_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (str(tmp_path / "none"), "runs/none", "./a/b"):
        assert main(["tokenize", name, "x.wav"]) in (1, 2)
        error = capsys.readouterr().err
        assert "config.json" in error
        assert "hub says" not in error
