"""`bridle launch`: starts this node's ranks of a pretraining run, and passes signals and exit codes on.

torchrun and the deepspeed launcher turn every rank's exit code into 1, and end ranks that are writing a checkpoint 30 s
after SIGTERM. A cluster's failure policy needs the codes, and its grace period is the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping

from bridle.cores import available_cores
from bridle.settings import RecipeError

HELP = "start this node's ranks of a pretraining or fine-tuning run, under Kubernetes, Slurm or by hand"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEFT_BEHIND_SECONDS = 5.0
"""How long the other ranks may take to notice by themselves that one has failed, and say so."""
ENDING_SECONDS = 30.0
"""After SIGTERM, which then follows, until SIGKILL. Without a failure nothing is ever killed."""
WRONG, STOPPED = 2, 75
LARGEST_PORT = 65_535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """torchrun's names and torchrun's variables, so that what sets those for torchrun sets them here."""
    parser.usage = "bridle launch [options] -- --deepspeed_config FILE [arguments of bridle/pretrain.py]"
    parser.add_argument("--nnodes", metavar="N", help="nodes of the run (PET_NNODES; 1)")
    parser.add_argument("--node-rank", metavar="N", help="this node, from 0 (PET_NODE_RANK)")
    parser.add_argument("--nproc-per-node", metavar="N", help="ranks on each node (PET_NPROC_PER_NODE; one a GPU)")
    parser.add_argument("--master-addr", metavar="HOST", help="where node 0 is found (PET_MASTER_ADDR)")
    parser.add_argument("--master-port", metavar="PORT", help="a free port there (PET_MASTER_PORT; 29500)")
    parser.add_argument(
        "--wait-for-master", type=float, default=0.0, metavar="SECONDS", help="for node 0's name to be known (0)"
    )
    parser.add_argument("--finetune", action="store_true", help="start bridle/finetune.py, not bridle/pretrain.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of bridle/pretrain.py")


def run(args: argparse.Namespace) -> int:
    """Starts the ranks, and returns when all have ended.

    Returns 0 when all did; 2 when one refused its arguments; else what the first that failed by itself returned, 128
    + N for signal N; 75 when all were asked to stop or lost another node's rank (docs/training.md, "Exit codes").

    Raises:
        RecipeError: counts, an address or a port that cannot be.
        OSError: node 0's name is not known in time.
    """
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    program = "bridle.finetune" if args.finetune else "bridle.pretrain"
    return start([sys.executable, "-m", program, *arguments], placement(args, os.environ), args.wait_for_master)


def start(command: list[str], places: Mapping[int, Mapping[str, str]], patience: float = 0.0) -> int:
    """Starts a command once for each place (see `placement`), and returns when all have ended, as `run` does.

    patience: seconds for node 0's name to be known.

    Raises:
        OSError: it is not known in time.
    """
    # Blocked before the first rank starts, so that a signal between two starts reaches both.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
    try:
        if not wait_for_name(next(iter(places.values()))["MASTER_ADDR"], patience):
            return STOPPED
        ranks = {
            os.posix_spawn(command[0], command, {**os.environ, **place}, setsigmask=[], setsigdef=PASSED_ON): rank
            for rank, place in places.items()
        }
        return supervise(ranks)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*PASSED_ON, signal.SIGCHLD})


def placement(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[int, dict[str, str]]:
    """What each rank of this node finds in its environment, by its rank among all.

    Raises:
        RecipeError
    """
    nodes = _number(args.nnodes, "nnodes", environment, "1", least=1)
    local = _number(args.nproc_per_node, "nproc_per_node", environment, None, least=1) or _gpus()
    node = _number(args.node_rank, "node_rank", environment, "0" if nodes == 1 else "", least=0)
    if node >= nodes:
        raise RecipeError(f"node_rank {node} of {nodes} nodes: expected 0 to {nodes - 1}; check {_names('node_rank')}")
    port = _number(args.master_port, "master_port", environment, "29500", least=1)
    if port > LARGEST_PORT:
        raise RecipeError(f"master_port {port}: expected 1 to {LARGEST_PORT}; check {_names('master_port')}")
    address = args.master_addr or environment.get("PET_MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else "")
    if not address:
        raise RecipeError(f"{nodes} nodes and no address of node 0; give {_names('master_addr')}")
    common = {
        "WORLD_SIZE": str(nodes * local),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(max(1, available_cores() // local)),
    }
    return {node * local + i: {**common, "RANK": str(node * local + i), "LOCAL_RANK": str(i)} for i in range(local)}


def wait_for_name(address: str, seconds: float) -> bool:
    """Until the name is known, as a pod's is once it has been scheduled; false if a signal came first.

    Raises:
        OSError
    """
    end = time.monotonic() + seconds
    told = False
    while seconds > 0:
        try:
            socket.getaddrinfo(address, None)
            return True
        except socket.gaierror as error:
            if time.monotonic() > end:
                raise OSError(
                    f"{address}: not known after {seconds:g} s ({error.strerror}); check {_names('master_addr')}, and"
                    " that node 0 was started"
                ) from None
        if not told:
            print(f"bridle launch: waiting for node 0, {address}, to have a name", flush=True)
            told = True
        if signal.sigtimedwait(PASSED_ON, 1.0) is not None:
            return False
    return True


def supervise(ranks: dict[int, int]) -> int:
    """Waits for processes (id to rank), passing signals on; the exit code of `run`.

    As a container's first process it also collects whatever its ranks leave behind.
    """
    running, codes = dict(ranks), []
    asked = failing = False
    kill_at = {signal.SIGTERM: float("inf"), signal.SIGKILL: float("inf")}
    while running:
        caught = signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, 1.0)
        if caught is not None and caught.si_signo != signal.SIGCHLD:
            print(f"bridle launch: {signal.Signals(caught.si_signo).name}: passed on to the ranks", flush=True)
            _send(running, caught.si_signo)
            asked = True
        for process, code in _ended():
            if process not in running:
                continue
            rank = running.pop(process)
            codes.append(code)
            if code and running and not (asked if code == STOPPED else failing):
                print(f"bridle launch: rank {rank} ended with {_said(code)}; ending this node's others", flush=True)
                kill_at[signal.SIGTERM] = time.monotonic() + LEFT_BEHIND_SECONDS
                asked = True
                # One that was asked to stop leaves rank 0 behind to upload a checkpoint, however long that takes.
                if code != STOPPED:
                    kill_at[signal.SIGKILL] = kill_at[signal.SIGTERM] + ENDING_SECONDS
                    failing = True
        for number, moment in kill_at.items():
            if time.monotonic() >= moment:
                _send(running, number)
                kill_at[number] = float("inf") if number == signal.SIGTERM else moment
    failed = [code if code > 0 else 128 - code for code in codes if code]
    failed.sort(key=lambda code: (code != WRONG, code == STOPPED))
    return next(iter(failed), 0)


def _ended() -> list[tuple[int, int]]:
    found = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((ended[0], os.waitstatus_to_exitcode(ended[1])))
    return found


def _send(processes: Mapping[int, int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _said(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _names(name: str) -> str:
    return f"--{name.replace('_', '-')} or PET_{name.upper()}"


def _number(given: str | None, name: str, environment: Mapping[str, str], default: str | None, least: int) -> int:
    """A count from its flag, its variable or its default; 0 for none where it has no default."""
    text = given or environment.get(f"PET_{name.upper()}") or default
    if text is None or (name == "nproc_per_node" and text in ("auto", "gpu")):
        return 0
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise RecipeError(f"{name} {text!r}: expected a whole number from {least}; check {_names(name)}")
    return int(text)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() or 1
