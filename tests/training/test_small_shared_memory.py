"""A container's /dev/shm may be too small for the loaders' batches: a run is slower then, and the same."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, TINY, command, environment, pretrain, rows
from untrained import save_untrained

from bridle.config import load_recipe


def with_shared_memory(size: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in a mount namespace whose /dev/shm has that size, as Docker gives 64m to each container."""
    mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {shlex.join(words)}"
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if with_shared_memory("1m", ["true"]).returncode:
        pytest.skip("no mount namespace may be made here (unshare --mount), so /dev/shm cannot be made small")


@pytest.mark.slow
def test_a_run_goes_on_through_the_pipe_and_says_so_once(tmp_path: Path) -> None:
    small, roomy = tmp_path / "small", tmp_path / "roomy"
    few = ["data.workers=2", "phases.1.steps=6", "phases.2.steps=6", "phases.3.steps=6"]
    done = with_shared_memory("1m", command(small, *few))
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count("/dev/shm (1 MiB) has no room for all batches") == 1, said
    assert "--shm-size=2g" in said
    assert "/dev/shm" not in pretrain(roomy, *few).stdout
    assert rows(small) == rows(roomy)


def test_codebooks_are_measured_with_little_shared_memory(tmp_path: Path) -> None:
    model = save_untrained(tmp_path / "model", load_recipe(str(TINY), ["clip.seconds=2.56"]), "tiny")
    words = [sys.executable, "-m", "bridle.cli", "codebooks", str(model), "builtin:audio-heldout"]
    done = with_shared_memory("1m", [*words, "--workers", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 20 files" in done.stdout
