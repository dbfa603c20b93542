"""A run never goes on, unasked, on other data than it was begun with; asked to, it says in which order."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from launching import ROOT, pretrain, rows, start_and_signal

from bridle.data.order import SampleOrder


def build(folder: Path, target: Path, *options: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "bridle.cli", "shards", "build", "--kind", "folder", "--samples-per-shard", "8",
         str(folder), str(target), *options],
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip


def sounds(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        soundfile.write(folder / f"s{seed}_{i}.wav", rng.standard_normal(8000) * 0.1, 16000)
    return folder


def begin_and_stop(run: Path, *arguments: str) -> None:
    """Begins a run and stops it in the middle of its first encoder phase."""
    code, output = start_and_signal(run, 2, signal.SIGTERM, *arguments)
    assert code == 75, output


@pytest.mark.slow
def test_shards_of_two_folders_may_have_the_same_names(tmp_path: Path) -> None:
    for number, (name, count) in enumerate((("speech", 5), ("music", 9)), 1):
        build(sounds(tmp_path / f"{name}-sounds", count, seed=number), tmp_path / name)
    short = ("phases=[{kind: cold_start}, {kind: encoder, steps: 2, lr: 1.0e-3}]", "--data")
    both = [f"{tmp_path}/{name}/shard-00000*.tar" for name in ("speech", "music")]
    pretrain(tmp_path / "run", *short, *both)
    assert "done" in pretrain(tmp_path / "run", *short, *both).stdout
    other = pretrain(tmp_path / "run", *short, *both[::-1], check=False)
    assert other.returncode == 2 and "changed in content: shard-000000.tar, shard-000000.tar" in other.stderr
    (tmp_path / "music" / "shard-000001.tar").unlink()
    fewer = pretrain(tmp_path / "run", *short, *both, check=False)
    assert fewer.returncode == 2 and "begun with other data (gone: shard-000001.tar)" in fewer.stderr


@pytest.mark.slow
def test_a_run_refuses_changed_shards_goes_on_with_moved_ones_and_with_new_ones_when_told(tmp_path: Path) -> None:
    run, first = tmp_path / "run", tmp_path / "first"
    build(sounds(tmp_path / "sounds", 24, seed=1), first, "--heldout", "0.1")
    long = ("phases.1.steps=60", "phases.2.steps=2", "phases.3.steps=2")
    begin_and_stop(run, "--data", f"{first}/*.tar", "--heldout", f"{first}/heldout/*.tar", *long)

    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    given = ("--data", f"{moved}/*.tar", "--heldout", f"{moved}/heldout/*.tar", *long)
    build(sounds(tmp_path / "more", 6, seed=2), tmp_path / "extra")
    shutil.copy(tmp_path / "extra" / "shard-000000.tar", moved / "shard-000009.tar")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = pretrain(run, *given, check=False)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "error" in line]
    assert f"{run} was begun with other data (new: shard-000009.tar); put it back, or go on with" in line
    assert "--allow-new-data" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    stopped = json.loads(max(run.glob("checkpoints/phase-1-encoder/step-*/state.json")).read_text())
    done = pretrain(run, *given, "--allow-new-data")
    assert "done" in done.stdout
    record = json.loads((run / "data.json").read_text())
    assert record["since"] == {"phase": 1, "samples": stopped["samples"]} and stopped["samples"] > 0
    assert rows(run)[-1]["step"] == 2

    assert "done" in pretrain(run, *given).stdout  # from now on these are its data
    (moved / "shard-000009.tar").unlink()
    gone = pretrain(run, *given, check=False)
    assert gone.returncode == 2 and "gone: shard-000009.tar" in gone.stderr


def test_data_without_heldout_says_that_nothing_is_evaluated_and_names_what_lies_beside(tmp_path: Path) -> None:
    build(sounds(tmp_path / "sounds", 8, seed=1), tmp_path / "shards", "--heldout", "0.2")
    (tmp_path / "run").write_text("in the way, so that the run ends here")
    done = pretrain(tmp_path / "run", "--data", f"{tmp_path}/shards/*.tar", check=False)
    assert "no held-out clips, so nothing is evaluated" in done.stdout
    assert f"give --heldout '{tmp_path}/shards/heldout/*.tar'" in done.stdout


def test_from_where_a_list_came_into_use_an_epoch_of_its_own_begins() -> None:
    order = SampleOrder([10, 7], seed=3, block=2, window=3, origin=101)
    fresh = SampleOrder([10, 7], seed=3, block=2, window=3)
    found = [order.locate(position) for position in range(101, 101 + 51)]
    assert found == [fresh.locate(position) for position in range(51)]
    assert Counter(sample for _, sample in found) == Counter(dict.fromkeys(range(17), 3))
    with pytest.raises(ValueError, match="position 100 stands before 101"):
        order.locate(100)
