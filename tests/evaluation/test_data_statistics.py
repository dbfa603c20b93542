"""`bridle shards stats`, and recipes that take its figures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from evaluation_inputs import tone, write_tar
from launching import pretrain

from bridle.cli import main
from bridle.data.shards import open_shards
from bridle.errors import MistakeError
from bridle.evaluation.data_statistics import read
from bridle.modalities import build_modality
from bridle.modalities.fbank import fbank


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two shards of noise of 0.5, 1.5 and 4 s, and a sample that is none."""
    rng = np.random.default_rng(0)
    noise = [0.01 * rng.normal(size=round(seconds * 16_000)) for seconds in (0.5, 1.5, 4.0)]
    write_tar(tmp_path / "0.tar", {"a.wav": wav(noise[0]), "b.wav": wav(noise[1]), "c.wav": b"no sound at all"})
    write_tar(tmp_path / "1.tar", {"d.wav": wav(noise[2]), "e.flac": tone(1.0, "FLAC")})
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): rest.strip() for name, _, rest in (line.partition(":") for line in lines)}


def test_the_figures_are_those_of_all_content(sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "stats", f"{sounds}/*.tar", "--seconds", "1", "2"]) == 0
    told = printed(capsys)
    found = []
    for name in ("0.tar", "1.tar"):
        import tarfile

        with tarfile.open(sounds / name) as tar:
            for member in tar.getmembers():
                data = tar.extractfile(member).read()
                if data.startswith(b"no"):
                    continue
                samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
                found.append(fbank(torch.from_numpy(samples - samples.mean()), 128).flatten())
    energies = torch.cat(found).double()
    assert float(told["mean"]) == pytest.approx(float(energies.mean()), abs=2e-4)
    assert float(told["std"]) == pytest.approx(float(energies.std()), abs=2e-4)
    assert told["kinds"] == "wav 3, flac 1"
    assert told["rates"] == "16000 Hz 4"
    assert told["seconds"].startswith("7 in all; least, quartiles and most 0.50 ")
    assert told["padding"] == "12 % at 1 s, 38 % at 2 s"
    assert any("1 cannot be decoded (`bridle shards check --modality audio` names them)" in line for line in told)
    assert (sounds / "0.tar.stats").is_file() and (sounds / "1.tar.stats").is_file()


def test_a_second_look_reads_what_the_first_wrote(sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "stats", f"{sounds}/*.tar"]) == 0
    first, written = printed(capsys), (sounds / "0.tar.stats").stat().st_mtime_ns
    assert main(["shards", "stats", f"{sounds}/*.tar", "--modality", "audio"]) == 0
    assert printed(capsys) == first
    assert (sounds / "0.tar.stats").stat().st_mtime_ns == written


def test_a_shard_that_was_built_again_is_measured_again(sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "index", f"{sounds}/1.tar"]) == main(["shards", "stats", f"{sounds}/*.tar"]) == 0
    before = printed(capsys)["mean"]
    louder = np.random.default_rng(1).normal(size=64_000)
    write_tar(sounds / "1.tar", {"d.wav": wav(0.1 * louder), "e.flac": tone(1.0, "FLAC")})  # of the same sizes
    assert main(["shards", "index", f"{sounds}/1.tar"]) == 0
    with pytest.raises(MistakeError, match=r"1\.tar: no statistics"):
        read([(open_shards([f"{sounds}/*.tar"], extensions=["wav", "flac"]), 1.0)], build_modality("audio", {}))
    assert main(["shards", "stats", f"{sounds}/*.tar"]) == 0
    assert float(printed(capsys)["mean"]) > float(before) + 1


def test_a_recipe_takes_mean_and_deviation_from_the_shards(sounds: Path, tmp_path: Path) -> None:
    short = ["phases=[{kind: cold_start}, {kind: encoder, steps: 2, lr: 1.0e-3}]", "data.max_corrupt=1.0"]
    auto = ["--data", f"{sounds}/*.tar", "clip.mean=auto", "clip.std=auto", *short]
    refused = pretrain(tmp_path / "run", *auto, check=False)
    assert refused.returncode == 2
    assert "bridle shards stats" in refused.stderr and "Traceback" not in refused.stderr
    assert main(["shards", "stats", f"{sounds}/*.tar"]) == 0
    first = pretrain(tmp_path / "run", *auto)
    assert "do not fit" not in first.stdout
    clip = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["clip"]
    assert clip["mean"] < -4 and clip["std"] > 0
    for file in sounds.glob("*.stats"):
        file.unlink()
    again = pretrain(tmp_path / "run", *auto)
    assert "done" in again.stdout
    other = pretrain(tmp_path / "other", "--data", f"{sounds}/*.tar", "clip.mean=5.0", "clip.std=0.5", *short)
    assert "do not fit clip.mean and clip.std" in other.stdout + other.stderr
    plain = ["--data", f"{sounds}/*.tar", *short]
    pretrain(tmp_path / "plain", *plain)
    changed = pretrain(tmp_path / "plain", *plain, "clip.mean=auto", check=False)
    assert changed.returncode == 2 and "clip.mean: None there" in changed.stderr
