"""Real pretraining processes for tests, small enough to take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
TIMES = {"samples_per_second", "step_seconds", "data_wait"}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1", **more}


def command(run: Path, *arguments: str, ranks: int = 1, config: str = "zero2") -> list[str]:
    """The command that a user would type; one rank goes without the launcher, which saves seconds."""
    launcher = [sys.executable]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    given = [] if "--recipe" in arguments else ["--recipe", str(TINY)]
    config_file = config if config.endswith(".json") else str(ROOT / "ds_configs" / f"{config}.json")
    return [
        *launcher,
        str(ROOT / "bridle/pretrain.py"),
        "--deepspeed_config",
        config_file,
        "--run",
        str(run),
        *given,
        *arguments,
    ]


def pretrain(run: Path, *arguments: str, ranks: int = 1, config: str = "zero2", check: bool = True):
    done = subprocess.run(
        command(run, *arguments, ranks=ranks, config=config),
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows(run: Path, with_times: bool = False) -> list[dict]:
    """Rows of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if with_times or k not in TIMES} for line in lines]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
