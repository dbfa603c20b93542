"""The process that others are forked from: clean, without threads, with the libraries imported.

The child of a fork that meets another thread of its parent as it begins or ends may wait for that thread for ever
(CPython's gh-112275, in Python 3.11 up to 3.11.10; libraries have locks of the same kind). A trainer and a service have
such threads; their template has none, and a child is there in the time of a fork.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

from bridle.processes.confinement import STOPS

CONTEXT = multiprocessing.get_context("forkserver")
"""Its processes are forked from the template."""


def start_template(*modules: str, environment: Mapping[str, str] | None = None) -> None:
    """Starts the template, unless it is there; it imports `modules` in the background.

    environment: all that it and its children see of the environment; ours, where there is none.

    It blocks the signals that stop a program, and so do its children until they say otherwise: a launcher, Slurm and a
    terminal signal the whole process group, and a checkpoint needs the loaders a little longer.
    """
    CONTEXT.set_forkserver_preload(["bridle.processes.template_silence", *modules])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # its start unblocks SIGTERM and SIGINT
        # Else a file in the current folder could stand for a library's module.
        with _only({**os.environ, "PYTHONSAFEPATH": "1"} if environment is None else environment):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _only(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    try:
        for name in before.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        yield
    finally:
        for name in environment.keys() - before.keys():
            os.environ.pop(name, None)
        os.environ.update(before)


def end_with_parent() -> None:
    """In a child: ends it with the process that started it, which is not the one it was forked from."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="bridle-parent", daemon=True).start()


def kill_at_exit() -> None:
    """At exit, multiprocessing sends SIGTERM, which children may block, and would then wait for them for ever."""
    multiprocessing.util.Finalize(None, _kill, exitpriority=100)


def _kill() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
