"""How a batch is split over ranks and accumulation steps changes nothing but the last digits."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import torch
from launching import ROOT, command, environment, pretrain, rows

from bridle.model_folder import load


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    pretrain(run)
    return run


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    pretrain(run, "data.workers=1", ranks=2, config="zero1")
    return run


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    run = tmp_path_factory.mktemp("accumulated") / "run"
    pretrain(run, "train.micro_batch_size=4")
    return run


@pytest.mark.slow
def test_two_ranks_of_4_and_one_of_8_give_the_same_losses(one_rank, two_ranks):
    for one, two in zip(rows(one_rank), rows(two_ranks), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3), (one, two)
        assert (one["step"], one["samples"]) == (two["step"], two["samples"])


@pytest.mark.slow
def test_accumulation_steps_give_the_same_losses(one_rank, accumulated):
    for one, other in zip(rows(one_rank), rows(accumulated), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-3)


@pytest.mark.slow
def test_codebooks_do_not_depend_on_how_the_first_batch_was_split(one_rank, two_ranks, accumulated):
    """k-means sees the first batch of all ranks, in the order of its positions."""
    runs = (one_rank, two_ranks, accumulated)
    first, *others = (load(run / "models/iteration-1").tokenizer.quantizer for run in runs)
    for other in others:
        torch.testing.assert_close(other.codebooks, first.codebooks, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.cluster_size, first.cluster_size)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_one_clear_line(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, "phases.1.steps=5000", ranks=2),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim = subprocess.run(["pgrep", "-f", f"local_rank=1.*{run}"], capture_output=True, text=True, check=True)
    for pid in victim.stdout.split():
        if "launch" not in open(f"/proc/{pid}/cmdline").read():  # noqa: SIM115, PTH123
            os.kill(int(pid), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Traceback" not in output, output
