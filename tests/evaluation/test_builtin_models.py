"""The demo models that ship: small, named by `builtin:`, usable wherever a model folder is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bridle
from bridle.cli import main
from bridle.data.shards import open_shards
from bridle.hub import HubError, local_folder
from bridle.model_folder import read_config
from serving.engine.registry import named_folder


@pytest.mark.parametrize("kind", ["audio", "image", "video"])
def test_a_demo_model_of_each_modality_is_small_learned_and_says_what_it_is_not(kind: str, tmp_path: Path) -> None:
    folder = local_folder(f"builtin:{kind}")
    assert (folder / "model.safetensors").stat().st_size <= 3_000_000
    card = (folder / "README.md").read_text()
    assert "**not** a model to build on" in card and f"builtin:{kind}" in card
    model = bridle.load(f"builtin:{kind}")
    assert model.info["tokenizer"] == "learned" and model.info["modality"] == kind
    shards = open_shards([f"builtin:{kind}-heldout"], extensions=model.modality.extensions)
    codes = model.tokenize(shards.data(0)).codes
    assert len(codes) and all(len(stage.unique()) > 1 for stage in codes.T), "one code everywhere says nothing"
    model.save_pretrained(tmp_path / "copy")
    assert bridle.load(tmp_path / "copy").tokenize(shards.data(0)).codes.equal(codes)


def test_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = open_shards(["builtin:audio-heldout"], extensions=("ogg",))
    clip = tmp_path / "clip.ogg"
    clip.write_bytes(shards.data(0))
    assert main(["tokenize", "builtin:audio", str(clip)]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "audio-demo"
    assert main(["codebooks", "builtin:sound", "builtin:audio-heldout"]) == 1
    assert "builtin:audio, builtin:image, builtin:video" in capsys.readouterr().err


def test_a_film_gets_codes_of_all_its_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = bridle.load("builtin:video")
    shards = open_shards(["builtin:video-heldout"], extensions=model.modality.extensions)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(max((shards.data(number) for number in range(len(shards))), key=len))
    assert main(["tokenize", "builtin:video", str(clip)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "video-demo" and found["modality"] == "video"
    positions = found["grid"]["time"] * found["grid"]["height"] * found["grid"]["width"]
    assert [len(codes) for codes in found["codes"]] == [positions] * 4
    assert found["grid"]["time"] > model.modality.grid["time"], "more than a window's"


def test_the_service_takes_it_under_its_own_name_or_another() -> None:
    alias, folder = named_folder("builtin:audio")
    assert alias is None and read_config(folder).name == "audio-demo"
    assert named_folder("mine=builtin:audio") == ("mine", folder)
    with pytest.raises(HubError, match="is none that ships"):
        named_folder("builtin:sound")
