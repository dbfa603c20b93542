"""A damaged checkpoint is refused by name, and the run goes on from the one before as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import pretrain, rows, start_and_signal

from bridle.cli import main


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(run)
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Stopped in its first encoder phase, with two checkpoints."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    start_and_signal(run, 4, signal.SIGTERM)
    return run


def flip(path: Path, position: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def newest(run: Path) -> Path:
    return max((run / "checkpoints/phase-1-encoder").glob("step-*"))


def flipped_moment(run: Path) -> Path:
    path = newest(run) / "optimizer.safetensors"
    flip(path)
    return path


def both_checkpoints(run: Path) -> Path:
    """A moment of the newest, and a digit of the one before."""
    flipped_moment(run)
    path = min((run / "checkpoints/phase-1-encoder").glob("step-*")) / "state.json"
    path.write_text(path.read_text().replace('"corrupt": 0', '"corrupt": 1'))
    return path


def flipped_cold_start(run: Path) -> Path:
    path = run / "checkpoints/phase-0-cold_start/finished/tokenizer.safetensors"
    flip(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "then"),
    [
        (flipped_moment, "phase 1 (encoder) goes on from step-0000000"),
        (both_checkpoints, "phase 1 (encoder) begins again"),
        (flipped_cold_start, "phase 0 (cold_start) begins again"),
    ],
)
def test_a_damaged_file_is_named_and_the_run_ends_as_an_undisturbed_one(
    damage: Callable[[Path], Path], then: str, stopped, undisturbed, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    path = damage(run)
    line = next(line for line in pretrain(run).stdout.splitlines() if str(path) in line)
    assert "damaged" in line
    assert then in line
    assert rows(run) == rows(undisturbed)
    final = "models/final/model.safetensors"
    assert (run / final).read_bytes() == (undisturbed / final).read_bytes()
    aside = [path.name for path in run.glob("checkpoints/set-aside/*")]
    assert aside == (["phase-1-encoder.0"] if damage is flipped_cold_start else [])


@pytest.mark.slow
def test_a_phase_whose_result_is_damaged_ends_again_from_its_last_checkpoint(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    result = run / "checkpoints/phase-3-encoder/finished/encoder.safetensors"
    good = result.read_bytes()
    flip(result)
    done = pretrain(run)
    assert f"{result}: damaged" in done.stdout
    assert "phase 3 (encoder) goes on from step-00000008" in done.stdout
    assert result.read_bytes() == good
    assert rows(run) == rows(undisturbed)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip(folder / "encoder.safetensors"),
        lambda folder: (folder / "decoder.safetensors").unlink(),
        lambda folder: (folder / "more.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {"state.json": 3}}'),
        lambda folder: flip(folder / "manifest.json", 40),
    ],
)
def test_no_model_is_exported_from_a_damaged_result(spoil, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    spoil(run / "checkpoints/phase-3-encoder/finished")
    assert main(["export", str(run), str(tmp_path / "model")]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(run / "checkpoints/phase-3-encoder/finished") in said
    assert not (tmp_path / "model").exists()
