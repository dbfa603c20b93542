"""ESC-50's five folds through the command, on a miniature of its download, to their table and page."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import numpy as np
import pytest
import soundfile
from launching import ROOT, environment
from moto.server import ThreadedMotoServer
from small_models import write_model

from bridle.cli import main
from bridle.data.shards import open_mixture
from bridle.evaluation.probe import read_labels
from bridle.training.finetune_run import made_folds

FOLDS = ["1", "2", "3", "4", "5"]
SHORT = [
    "clip.seconds=1.0", "phases.0.epochs=null", "phases.0.warmup_epochs=null", "phases.0.steps=6",
    "phases.0.warmup_steps=1", "train.batch_size=8", "train.micro_batch_size=8", "train.log_every=2",
    "train.prometheus_port=0", "data.workers=0",
]  # fmt: skip


def write_esc50(root: Path) -> None:
    """Two classes, two sounds of each in every fold: a low and a high tone in noise."""
    (root / "meta").mkdir(parents=True)
    (root / "audio").mkdir()
    rng, lines = np.random.default_rng(0), ["filename,fold,target,category"]
    for fold in FOLDS:
        for number, (name, pitch) in enumerate([("cow", 250), ("bird", 3000)] * 2):
            time = np.arange(14_400) / 16_000
            file = f"{fold}-{number}-A-{number % 2}.wav"
            sound = 0.3 * np.sin(2 * np.pi * pitch * time) + rng.normal(0, 0.03, len(time))
            soundfile.write(root / "audio" / file, sound.astype(np.float32), 16_000)
            lines.append(f"{file},{fold},{number % 2},{name}")
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")


def made(first: Path, second: Path) -> list[str]:
    """The fold of each file of two folders, of five that no member names."""
    shards = open_mixture([([f"{folder}/*.tar"], 1.0) for folder in (first, second)], extensions=["wav"])
    return made_folds(read_labels(shards, "cls", None)[0], shards, 5, "1/5")


def test_a_file_stays_in_its_fold_wherever_its_shards_lie(tmp_path: Path) -> None:
    for folder in ("1/speech", "2/music"):
        (tmp_path / folder).mkdir(parents=True)
        with tarfile.open(tmp_path / folder / "shard-000000.tar", "w") as tar:
            for i in range(20):
                for name, content in ((f"{folder[2:]}{i}.wav", b"x"), (f"{folder[2:]}{i}.cls", b"ab"[i % 2 :][:1])):
                    member = tarfile.TarInfo(name)
                    member.size = 1
                    tar.addfile(member, io.BytesIO(content))
    before = made(tmp_path / "1/speech", tmp_path / "2/music")
    for folder in ("1/speech", "2/music"):  # speech stands behind music now, if one goes by paths
        shutil.copytree(tmp_path / folder, tmp_path / "moved" / folder[2:])
    assert made(tmp_path / "moved/speech", tmp_path / "moved/music") == before
    assert set(before) == set(FOLDS)


@pytest.mark.slow  # five runs are what five folds are
def test_each_fold_is_held_out_in_its_turn_and_all_files_are_scored_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_esc50(tmp_path / "ESC-50-master")
    shards, run = tmp_path / "ESC50", tmp_path / "run"
    assert main(["shards", "build", "--kind", "esc50", str(tmp_path / "ESC-50-master"), str(shards)]) == 0
    model = write_model(tmp_path / "model")
    command = [sys.executable, "-m", "bridle.cli", "finetune", str(model), str(shards / "*.tar"), *SHORT]
    command += ["--recipe", "esc50", "--run", str(run), "--folds", *FOLDS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [
        line for line in done.stdout.splitlines() if " files, accuracy " in line and line.startswith(("fold", "all"))
    ]
    assert [line.partition(", accuracy")[0] for line in table] == [
        *(f"fold-{fold}: 4 files" for fold in FOLDS), "all folds: 20 files"
    ]  # fmt: skip
    for fold in FOLDS:
        with np.load(run / f"fold-{fold}" / "heldout_scores.npz") as scored:
            assert sorted(Path(name).name for name in scored["files"].tolist()) == [
                f"{fold}-{number}-A-{number % 2}" for number in range(4)
            ]
            assert scored["classes"].tolist() == ["bird", "cow"]
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    every = table[-1].split("accuracy ")[1].partition(", ")[0]
    assert f"<td>all folds</td><td>20</td><td>{every.split(' [')[0]} [" in page
    assert page.count("Curves of fold-") >= 5 and "<td>bird</td><td>10</td>" in page
    assert "accuracy" in capsys.readouterr().err
    assert main(["compare", str(run), "--with", str(run)]) == 0


@pytest.mark.slow  # two runs
def test_folds_in_a_store_are_told_together_and_leave_nothing_here(tmp_path: Path) -> None:
    write_esc50(tmp_path / "ESC-50-master")
    shards, here = tmp_path / "ESC50", tmp_path / "here"
    here.mkdir()
    assert main(["shards", "build", "--kind", "esc50", str(tmp_path / "ESC-50-master"), str(shards)]) == 0
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    keys["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    try:
        boto3.client(
            "s3", endpoint_url=keys["AWS_ENDPOINT_URL"], region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="test",
        ).create_bucket(Bucket="runs")  # fmt: skip
        command = [sys.executable, "-m", "bridle.cli", "finetune", str(write_model(tmp_path / "model"))]
        command += [str(shards / "*.tar"), *SHORT, "--recipe", "esc50", "--run", "s3://runs/folds", "--folds", "1", "2"]
        done = subprocess.run(
            command, cwd=here, env=environment(**keys, XDG_CACHE_HOME=str(tmp_path / "cache")), capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
    finally:
        server.stop()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fold-2: 4 files, accuracy" in done.stdout and "all folds: 8 files, accuracy" in done.stdout
    assert not list(here.iterdir())
