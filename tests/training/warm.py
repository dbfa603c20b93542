"""Training processes without the seconds of their imports: forked from one that has imported everything already.

In all else they are as others: a pid, an environment, output and an exit code of their own, and signals. Not for tests
of what comes before our code runs: the interpreter, imports, a launcher, limits of the process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from bridle.training.stopping import STOPPED

MODULES = (
    "deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.muon_optimizer", "bridle.cli", "bridle.training.run",
    "bridle.training.finetune_run", "bridle.modalities.audio", "bridle.modalities.audio_decode",
    "bridle.modalities.image", "bridle.modalities.video",
)  # fmt: skip
INT = struct.Struct("i")


class WarmProcess:
    """What is used here of `subprocess.Popen`, for ``python SCRIPT ARGUMENTS``; its output goes to open files."""

    def __init__(self, words: list[str], env: Mapping[str, str], cwd: Path, stdout: IO, stderr: IO) -> None:
        assert words[0] == sys.executable
        template, log = the_template()
        self.args, self.returncode = words, None
        self._status, theirs = os.pipe()
        wanted = json.dumps({"words": words[1:], "environment": dict(env), "folder": str(cwd)})
        socket.send_fds(template, [wanted.encode()], [stdout.fileno(), stderr.fileno(), theirs])
        os.close(theirs)
        told = os.read(self._status, INT.size)
        assert told, "the template ended: " + Path(f"/proc/self/fd/{log.fileno()}").read_text()
        (self.pid,) = INT.unpack(told)

    def poll(self) -> int | None:
        return self._returned(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._returned(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def _returned(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            (status,) = INT.unpack(os.read(self._status, INT.size))
            os.close(self._status)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_warm(
    words: list[str], env: Mapping[str, str], cwd: Path, ranks: Sequence[Mapping[str, str]] = ({},)
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` does with captured text. ranks: what each of several processes that run together has in its
    environment besides; the exit code is that of the one that failed, not of those that lost it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        processes = [WarmProcess(words, {**env, **more}, cwd, out, err) for more in ranks]
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(
            words, min(codes, key=lambda code: (code == 0, code == STOPPED)), out.read(), err.read()
        )


@cache
def the_template() -> tuple[socket.socket, IO[bytes]]:
    """Its socket, and what it prints. It ends with the process of the tests, which holds the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = tempfile.TemporaryFile()  # noqa: SIM115
    variables = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "CUDA_VISIBLE_DEVICES": "",  # a GPU that an import looked at could not be used after a fork
    }
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, pass_fds=[theirs.fileno()],
        )  # fmt: skip
    return ours, log


def template(requests: socket.socket) -> tuple[dict, int, int]:
    """Forks for each request; returns in the child that is to become the process, with its output's descriptors."""
    for module in MODULES:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread began in an import, which a fork would lose"  # noqa: PTH208
    gc.freeze()  # else the collector of each child would copy the memory of all that was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        out, err, status = descriptors
        if not os.fork():
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if not (child := os.fork()):
                os.close(status)
                return json.loads(message), out, err
            os.close(out)
            os.close(err)
            os.write(status, INT.pack(child))
            os.write(status, INT.pack(os.waitpid(child, 0)[1]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def become(wanted: dict, out: int, err: int) -> None:
    """Runs a script as ``python SCRIPT`` does."""
    for descriptor, number in ((out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    sys.argv = wanted["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    become(*template(socket.socket(fileno=int(sys.argv[1]))))
