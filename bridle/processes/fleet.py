"""Equal processes, each a program of its own, kept alive side by side until a signal ends them all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

_PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM, signal.SIGHUP: signal.SIGHUP}
_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
"""Seconds before one that ended by itself starts again: twice as long each time that it did not last."""
_LASTED = 60.0
_LOOK_SECONDS = 1.0


class Fleet:
    """Programs that run beside each other.

    Args:
        commands: one for each. It begins with the signals blocked that are passed on, until it hears them.
        given: what each reads on its standard input, which stays open for as long as we live.
        descriptor: of memory that all of them share.
    """

    def __init__(self, commands: Sequence[Sequence[str]], given: Sequence[bytes], descriptor: int) -> None:
        self._commands = commands
        self._given = given
        self._descriptor = descriptor
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._due: dict[int, float] = {}
        self._began = [0.0] * len(commands)
        self._pauses = [_PAUSE] * len(commands)

    def run(self, ended: Callable[[int, int], bool]) -> int:
        """Runs all until SIGTERM or SIGINT, which they get as SIGTERM. Returns the first exit code that is not 0.

        ended: called with the number and the exit code of one that ended by itself; whether another is to take its
        place. If not, all are ended.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
        try:
            for number in range(len(self._commands)):
                self._start(number)
            code = self._watch(ended)
            self._tell(signal.SIGTERM)
            codes = [process.wait() for process in self._running.values()]
            return next((one for one in (code, *codes) if one), 0)
        finally:
            for process in self._running.values():
                process.kill()

    def _watch(self, ended: Callable[[int, int], bool]) -> int:
        """Until it is time to end; the exit code of one that must not be replaced."""
        while True:
            got = signal.sigtimedwait({*_PASSED_ON, signal.SIGCHLD}, _LOOK_SECONDS)
            number = signal.SIGCHLD if got is None else signal.Signals(got.si_signo)
            if number in (signal.SIGTERM, signal.SIGINT):
                return 0
            if number == signal.SIGHUP:
                self._tell(signal.SIGHUP)
            for which, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[which]
                if not ended(which, code):
                    return code or 1
                lasted = time.monotonic() - self._began[which] > _LASTED
                self._pauses[which] = _PAUSE if lasted else min(2 * self._pauses[which], _LONGEST_PAUSE)
                self._due[which] = time.monotonic() + self._pauses[which]
            for which in [which for which, due in self._due.items() if due <= time.monotonic()]:
                del self._due[which]
                self._start(which)

    def _start(self, number: int) -> None:
        self._began[number] = time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # it inherits this; the others it unblocks itself
        process = subprocess.Popen(self._commands[number], stdin=subprocess.PIPE, pass_fds=[self._descriptor])
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        self._running[number] = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which is noticed next
            os.write(process.stdin.fileno(), self._given[number])

    def _tell(self, number: signal.Signals) -> None:
        for process in self._running.values():
            process.send_signal(number)
