"""`bridle tokenize`, through the command line's door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import bridle
from bridle.cli import main

FIELDS = {"file", "model", "modality", "grid", "codebooks", "codebook_size", "duration_s", "codes"}


def test_tokenize_prints_the_codes_that_load_gives(
    model_folder: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", str(model_folder), str(sound)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    answer = json.loads(printed[0])
    stream = bridle.load(model_folder).tokenize(sound)
    assert set(answer) == FIELDS
    assert answer["codes"] == stream.codes.T.tolist()
    assert len(answer["codes"]) == answer["codebooks"] == 4
    assert {len(row) for row in answer["codes"]} == {answer["grid"]["time"] * answer["grid"]["frequency"]}
    assert answer["codebook_size"] == 64
    assert answer["duration_s"] == pytest.approx(2.5)
    assert (answer["modality"], answer["model"], answer["file"]) == ("audio", "tiny", str(sound))


def test_wav_and_flac_of_one_sound_give_the_same_codes(
    model_folder: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flac = tmp_path / "sound.flac"
    soundfile.write(flac, *soundfile.read(sound), subtype="PCM_16")
    assert main(["tokenize", str(model_folder), str(sound), str(flac)]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["codes"] == second["codes"]
    assert first["file"] != second["file"]


def test_an_undecodable_input_costs_one_line_and_not_the_others(
    model_folder: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF\x00\x00\x00\x00WAVEjunk")
    inputs = [tmp_path / "missing.wav", broken, tmp_path, sound]
    assert main(["tokenize", str(model_folder), *map(str, inputs)]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["file"] for line in captured.out.splitlines()] == [str(sound)]
    complaints = [line for line in captured.err.splitlines() if line.startswith("bridle tokenize: ")]
    for path, line in zip(inputs[:3], complaints[:3], strict=True):
        assert line.startswith(f"bridle tokenize: {path}: ")
    assert complaints[3:] == ["bridle tokenize: 3 of 4 files could not be tokenized"]
    assert "Traceback" not in captured.err


def test_npz_gets_one_whole_file_per_input(
    model_folder: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"nothing")
    out = tmp_path / "codes"
    arguments = ["tokenize", str(model_folder), str(broken), str(sound), "--out", str(out), "--format", "npz"]
    assert main(arguments) == 1
    assert capsys.readouterr().out == ""
    assert [path.name for path in out.iterdir()] == ["sound.wav.npz"]
    expected = bridle.load(model_folder).tokenize(sound).codes.T.numpy()
    with np.load(out / "sound.wav.npz", allow_pickle=False) as file:
        codes, answer = file["codes"], json.loads(str(file["info"]))
        assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, expected)
    assert set(answer) == FIELDS - {"codes"}


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (["--format", "npz"], 2, "--out"),
        (["--device", "warp"], 2, "--device warp"),
        (["--device", "cuda:99"], 2, "--device cuda:99"),
    ],
)
def test_a_wrong_argument_ends_with_one_line_and_exit_code_2(
    extra: list[str], code: int, said: str, model_folder: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", str(model_folder), str(sound), *extra]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_two_inputs_that_would_become_one_file_are_refused_before_work_begins(
    model_folder: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / sound.name
    out = tmp_path / "codes"
    assert main(["tokenize", str(model_folder), str(sound), str(other), "--out", str(out), "--format", "npz"]) == 2
    assert "sound.wav" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", str(tmp_path), str(sound)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "config.json" in error


def test_a_run_folder_in_place_of_a_model_names_the_model_in_it(
    tiny_run: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", str(tiny_run), str(sound)]) == 1
    expected = f"bridle: error: {tiny_run}: a run folder, not a model folder; did you mean '{tiny_run}/models/final'?"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_folder_of_files_is_answered_with_both_ways_to_give_them(
    model_folder: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", str(model_folder), str(sound.parent)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{sound.parent}: a folder; give its files ('{sound.parent}'/*), or make a data set of them all with" in line


def test_durations_are_rounded(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = tmp_path / "a.wav"
    soundfile.write(sound, np.zeros(16_000 * 3 + 1_234), 16_000)
    assert main(["tokenize", str(model_folder), str(sound)]) == 0
    assert '"duration_s": 3.077125,' in capsys.readouterr().out
