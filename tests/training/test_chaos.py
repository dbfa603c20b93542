"""Killed at random moments, again and again, a run ends as if nothing had happened.

CI kills it 6 times, once in each kind of moment. By hand, longer, and again as it was:

    BRIDLE_CHAOS_KILLS=20 BRIDLE_CHAOS_SEED=7 python -m pytest tests/training/test_chaos.py -s
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import ROOT, TINY, command, environment, free_port, output_of, processes_of, ranks_of, rows

from bridle.training.manifest import check_folder

KILLS = int(os.environ.get("BRIDLE_CHAOS_KILLS", "6"))
SEED = int(os.environ.get("BRIDLE_CHAOS_SEED", "700914")) or random.randrange(1, 10**6)  # 0 draws one
SETTINGS = ("train.evaluate_every=4", "train.log_every=2", "data.workers=1")
MOMENTS = ("import", "cold start", "step", "save", "evaluation", "export")
VICTIMS = ("launcher", "spawner", "rank 0", "rank 1", "node")


def start(run: Path, launcher: str) -> subprocess.Popen:
    if launcher == "deepspeed":
        words = command(run, *SETTINGS, ranks=2)
    else:
        bridle = str(Path(sys.executable).with_name("bridle"))
        given = ["--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), "--run", str(run), "--recipe", str(TINY)]
        port = str(free_port())
        words = [bridle, "launch", "--nproc-per-node", "2", "--master-port", port, "--", *given, *SETTINGS]
    with Path(f"{run}.log").open("a") as output:
        return subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=output, stderr=output)


def is_in(moment: str, run: Path, chance: random.Random) -> Callable[[], bool]:
    """Tells when a run is in a moment, as far as it shows on its disk."""
    delay = chance.uniform(0.0, 0.3)
    seen = len(rows(run)) if (run / "metrics.jsonl").exists() else 0

    def in_evaluation() -> bool:
        found = rows_of(run)
        return len(found) > seen and found[-1]["split"] == "train" and found[-1]["step"] in (4, 8, 10)

    def in_export() -> bool:
        done = [path.name for path in run.glob("checkpoints/phase-[13]-encoder/finished")]
        models = list(run.glob("models/iteration-*"))
        return len(models) < len(done) or bool(list(run.glob("models/.*")))

    shows: dict[str, Callable[[], bool]] = {
        "import": lambda: True,
        "cold start": (run / "recipe.yaml").exists,
        "step": lambda: len(rows_of(run)) > seen,
        "save": lambda: bool(list(run.glob("checkpoints/*/.*"))),
        "evaluation": in_evaluation,
        "export": in_export,
    }
    if moment in ("save", "evaluation", "export"):
        return shows[moment]
    since: list[float] = []

    def a_little_later() -> bool:
        if not since and shows[moment]() and len(ranks_of(run)) == 2:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > delay * (10 if moment == "import" else 1)

    return a_little_later


def rows_of(run: Path) -> list[dict]:
    with contextlib.suppress(OSError, ValueError):  # a row that is being written
        return rows(run)
    return []


def strike(run: Path, process: subprocess.Popen, victim: str) -> None:
    """Kills whom it is to kill; SIGKILL, or SIGTERM for half of the launchers and ranks."""
    with contextlib.suppress(psutil.Error, IndexError):  # it had just ended
        if victim == "node":
            for one in processes_of(run):
                with contextlib.suppress(psutil.Error):
                    one.kill()
        elif victim == "launcher":
            process.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
        elif victim == "spawner":
            ranks_of(run)[0].parent().kill()
        else:
            ranks_of(run)[int(victim[-1])].send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))


def wait_for_nobody(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400  # ranks that still import when their launcher dies finish that first
    while processes_of(run):
        process.poll()
        assert time.monotonic() < deadline, (processes_of(run), output_of(run))
        time.sleep(0.05)
    process.wait(timeout=120)


def check_what_stands(run: Path) -> None:
    """No checkpoint or result that can be seen is torn or damaged."""
    for folder in (*run.glob("checkpoints/*/step-*"), *run.glob("checkpoints/*/finished")):
        check_folder(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200 + 200 * KILLS)
def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one_to_the_last_digit(tmp_path):
    print(f"BRIDLE_CHAOS_SEED={SEED}")
    random.seed(SEED)
    chance = random.Random(SEED)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run-0"
    calm = start(undisturbed, "launch")
    assert calm.wait(timeout=600) == 0, output_of(undisturbed)
    plan = [(MOMENTS[i % len(MOMENTS)], VICTIMS[i % len(VICTIMS)]) for i in range(KILLS)]
    chance.shuffle(plan)
    finished: list[Path] = []
    while plan or run.exists():
        moment, victim = plan[0] if plan else ("", "")
        process = start(run, "deepspeed" if victim in ("launcher", "spawner") else "launch")
        due = is_in(moment, run, chance) if moment else lambda: False
        while process.poll() is None and not due():
            time.sleep(0.001)
        if process.poll() is None:
            print(f"{run.name}: {victim} killed in: {moment}")
            strike(run, process, victim)
            plan.pop(0)
        wait_for_nobody(run, process)
        check_what_stands(run)
        assert "Traceback" not in output_of(run), output_of(run)
        if process.returncode == 0 and (run / "models/final").exists() and not (run / "lock.json").exists():
            finished.append(run)
            run = tmp_path / f"run-{len(finished)}"
        else:
            assert plan or moment, output_of(run)
    for done in finished:
        assert rows(done) == rows(undisturbed), done
        for model in ("models/iteration-1", "models/iteration-2", "models/final"):
            ours, theirs = done / model / "model.safetensors", undisturbed / model / "model.safetensors"
            assert ours.read_bytes() == theirs.read_bytes(), model
        assert not list(done.glob("**/*.partial"))
        assert not list(done.glob("**/*.old"))
    assert finished
