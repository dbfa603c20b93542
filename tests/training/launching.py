"""Real pretraining processes for tests, small enough to take seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from halting import Halt
from warm import WarmProcess, run_warm

from bridle.ports import free_port

ROOT = Path(__file__).parents[2]
BRIDLE = str(Path(sys.executable).with_name("bridle"))
TINY = Path(__file__).with_name("tiny.yaml")
TIMES = {
    "samples_per_second", "step_seconds", "data_wait", "forward", "backward", "optimizer", "codebooks", "straggling",
    "memory_bytes", "flops_per_second", "mfu",
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1", **more}


def command(
    run: Path, *arguments: str, ranks: int = 1, config: str = "zero2", program: str = "bridle/pretrain.py"
) -> list[str]:
    """The command that a user would type; one rank goes without the launcher, which saves seconds."""
    launcher = [sys.executable]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    given = [] if "--recipe" in arguments else ["--recipe", str(TINY)]
    config_file = config if config.endswith(".json") else str(ROOT / "ds_configs" / f"{config}.json")
    return [
        *launcher,
        str(ROOT / program),
        "--deepspeed_config",
        config_file,
        "--run",
        str(run),
        *given,
        *arguments,
    ]


def pretrain(run: Path, *arguments: str, ranks: int = 1, config: str = "zero2", check: bool = True):
    """A whole run, warm; several ranks go without a launcher."""
    words = command(run, *arguments, config=config)
    done = run_warm(words, env=environment(), cwd=ROOT, ranks=[{}] if ranks == 1 else variables_of(ranks))
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def variables_of(ranks: int) -> list[dict[str, str]]:
    """What tells each rank of a machine who it is, as Kubernetes or Slurm would."""
    given = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**given, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def rows(run: Path, with_times: bool = False) -> list[dict]:
    """Rows of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if with_times or k not in TIMES} for line in lines]


def start(
    run: Path, *arguments: str, ranks: int = 1, warm: bool = True, halt: Halt | None = None, **more: str
) -> subprocess.Popen | WarmProcess:
    """The same, running; several ranks with a launcher. Its output goes to `RUN.log`, so that nobody has to read it for
    it to go on."""
    words, variables = command(run, *arguments, ranks=ranks), environment(**more)
    if halt is not None:
        words, variables = halt.put_in(words, variables)
    with Path(f"{run}.log").open("w") as output:
        if warm and ranks == 1:
            return WarmProcess(words, env=variables, cwd=ROOT, stdout=output, stderr=output)
        return subprocess.Popen(words, env=variables, cwd=ROOT, stdout=output, stderr=output)


def start_bare(
    run: Path, *arguments: str, ranks: int = 2, program: str = "bridle/pretrain.py", **more: str
) -> list[WarmProcess]:
    """The ranks alone, warm, as Kubernetes or Slurm start them: no launcher looks after them."""
    words = command(run, *arguments, program=program)
    with Path(f"{run}.log").open("a") as output:
        return [
            WarmProcess(words, env=environment(**{**one, **more}), cwd=ROOT, stdout=output, stderr=output)
            for one in variables_of(ranks)
        ]


def output_of(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def wait_for(
    what: Callable[[], object], process: subprocess.Popen | WarmProcess, run: Path, seconds: float = 300
) -> None:
    """Until `what` is true; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, output_of(run)
        assert time.monotonic() < deadline, output_of(run)
        time.sleep(0.002)


def wait_for_rows(run: Path, count: int, process: subprocess.Popen | WarmProcess) -> None:
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= count, process, run)


def start_and_signal(run: Path, rows_seen: int, number: int, *arguments: str) -> tuple[int, str]:
    """Starts a run and sends it a signal when it has so many rows of metrics."""
    halt = Halt(f"row {rows_seen}", Path(f"{run}.halt"))
    process = start(run, *arguments, halt=halt)
    wait_for(halt.reached, process, run)
    process.send_signal(number)
    if number != signal.SIGKILL:
        end_when_heard(halt, process, run)
    return process.wait(timeout=300), output_of(run)


def end_when_heard(halt: Halt, process: subprocess.Popen | WarmProcess, run: Path) -> None:
    """Lets a run go on once it knows that it is to stop."""
    wait_for(lambda: "stopping after this step" in output_of(run), process, run)
    halt.end()


def processes_of(run: Path) -> list[psutil.Process]:
    """The runner, the spawner and the ranks of a run, whoever their parents are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ranks_of(run: Path) -> list[psutil.Process]:
    """The ranks of a run, in order."""
    found = []
    for process in processes_of(run):
        with contextlib.suppress(psutil.Error):  # it ends just now
            if rank := process.environ().get("RANK"):
                found.append((int(rank), process.pid, process))
    return [process for *_, process in sorted(found)]
