"""Asked to stop: by a signal, or by the death of the launcher that started this rank.

Signals are heard by a thread of their own, so that a main thread that waits inside a library (for a peer, for a disk)
does not make a run deaf. Nothing heavy is imported here: a run listens before it imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

log = logging.getLogger("bridle")
STOPPED = 75
"""Exit code of a run that was asked to stop: sysexits' EX_TEMPFAIL, "try again"."""
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
"""SIGUSR1 is Slurm's early warning; SIGHUP a terminal that goes away (left alone where it is ignored: nohup)."""
POLL = 1.0
"""Seconds between two looks at the launcher."""
RUNNERS = {
    "bridle", "deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "torchrun", "torch.distributed.run",
}  # fmt: skip
SPAWNERS = {"deepspeed.launcher.launch"}
"""What DeepSpeed's runner starts, and what starts the ranks."""


class StoppedError(Exception):
    """The run was asked to stop; what had to be saved was saved."""


class StopRequest:
    """Whether somebody wants this process to stop. While nothing has to be saved it then ends at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.before_leaving: list[Callable[[], Any]] = []
        self._deferred = 0
        self._lock = threading.RLock()

    @property
    def asked(self) -> bool:
        """Whether it was asked to stop."""
        return self.reason is not None

    def listen(self) -> StopRequest:
        """Begins to listen; from the main thread, as early as can be."""
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _heard_by_the_thread)
        threading.Thread(target=self._watch, args=(read, Launcher()), name="bridle-stop", daemon=True).start()
        return self

    def over(self) -> None:
        """From here on the exit code stands. While Python shuts down, which takes torch seconds, it gives signals their
        default action back: a launcher that ends the others of a lost rank would be told of a death by SIGTERM."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a request only sets `asked`: the code inside looks at it, saves and raises StoppedError."""
        with self._lock:
            self._deferred += 1
        try:
            yield
        finally:
            with self._lock:
                self._deferred -= 1

    def ask(self, reason: str) -> None:
        """Asks this process to stop; returns only if it cannot end at once."""
        with self._lock:
            first, self.reason = self.reason is None, self.reason or reason
            if not self._deferred:
                self._leave()
        if first:
            log.info("%s: stopping after this step", reason)

    def _leave(self) -> None:
        for tidy in self.before_leaving:
            with contextlib.suppress(Exception):
                tidy()
        log.info("stopped by %s before there was anything to save; the same command starts again", self.reason)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(STOPPED)

    def _watch(self, signals: int, launcher: Launcher) -> None:
        while True:
            if select.select([signals], [], [], POLL)[0]:
                for number in os.read(signals, 64):
                    if number in SIGNALS:
                        self.ask(signal.Signals(number).name)
            elif not self.asked and launcher.is_gone():
                self.ask("the death of the launcher")


def _heard_by_the_thread(number: int, frame: Any) -> None:
    """Python wants a handler before it writes a signal's number to the wake-up pipe."""


class Launcher:
    """The processes of `bridle launch`, DeepSpeed's launcher or torchrun above this one; none under a shell.

    DeepSpeed's are two: the runner that a user starts and signals, and the spawner, the parent of the ranks.
    """

    def __init__(self) -> None:
        self.chain: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().parents():
                if not _words(process) & (RUNNERS | SPAWNERS):
                    break
                self.chain.append(process)
        self.late = self._died_before()

    def _died_before(self) -> bool:
        """Whether it died while this process was still being started: nobody above launches, and init adopted us."""
        launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ
        with contextlib.suppress(psutil.Error):
            top = self.chain[-1] if self.chain else psutil.Process()
            if launched and not _words(top) & RUNNERS:
                parent = top.parent()
                return parent is not None and (parent.pid == 1 or parent.name() in ("systemd", "init"))
        return False

    def is_gone(self) -> bool:
        """Whether any of them died: the one below it then has another parent."""
        if self.late:
            return True
        children = [psutil.Process(), *self.chain]
        try:
            return any(child.ppid() != parent.pid for child, parent in zip(children, self.chain, strict=False))
        except psutil.Error:
            return True


def _words(process: psutil.Process) -> set[str]:
    """Names of the program and module that a Python process runs."""
    return {Path(word).name for word in process.cmdline()[:6]}
