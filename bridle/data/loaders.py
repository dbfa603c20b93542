"""Loader processes: forked from a clean template, never from a trainer, whose threads a fork would leave behind.

The child of a fork that meets another thread of its parent as it begins or ends may wait for that thread for ever
(CPython's gh-112275, in Python 3.11 up to 3.11.10; libraries have locks of the same kind). A trainer has such threads:
autograd's, the collectives', the metrics server's. Its template has none, and it has torch and the decoders imported,
so that a loader is there in the time of a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bridle.data.errors import ShardError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_CONTEXT = multiprocessing.get_context("forkserver")


def start_template(*modules: str) -> None:
    """Starts the process that loaders are forked from, unless it is there; it imports `modules` in the background.

    It and all loaders block the signals that stop a run: the launcher, Slurm and a terminal signal the whole process
    group, and a checkpoint needs the loaders a little longer. They end with the process that started them.
    """
    _CONTEXT.set_forkserver_preload(list(modules))
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # else a file in the current folder could stand for a library's module
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # its start unblocks SIGTERM and SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def load(dataset: Dataset[Any], workers: int, sampler: Sampler[Any] | None = None) -> Iterator[Any]:
    """What `dataset` gives, item by item and as it is; made by `workers` processes, or in this one if 0.

    Processes begin at once, two items ahead each. `dataset` is pickled to them, and the main module is imported there
    again (as `__mp_main__`).

    Raises:
        ShardError: a process died.
    """
    if workers:
        start_template(type(dataset).__module__)
        multiprocessing.util.Finalize(None, _end_loaders, exitpriority=100)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_end_with_parent,
        multiprocessing_context=_CONTEXT if workers else None,
        # Its own generator: else every stream would move torch's global one.
        generator=torch.Generator(),
    )
    with _clear_death(workers):
        items = iter(loader)
    return _watched(items, workers)


def _watched(items: Iterator[Any], workers: int) -> Iterator[Any]:
    with _clear_death(workers):
        yield from items


@contextlib.contextmanager
def _clear_death(workers: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _means_dead_loader(error, workers):
            raise
        said = " ".join(str(error).split())[:200]
        fix = "Try fewer workers, or a larger /dev/shm (docker: --shm-size)"
        raise ShardError(f"a loader process died ({said}); out of memory or of shared memory? {fix}") from None


def _means_dead_loader(error: Exception, workers: int) -> bool:
    """torch notices it, or the dead one's tensors cannot be fetched. What a dataset raised is told apart."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return workers > 0 and "in DataLoader worker process" not in str(error)


def _end_with_parent(worker: int) -> None:
    """torch watches the process that a loader was forked from, but the template lives as long as its loaders."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="bridle-parent", daemon=True).start()


def _end_loaders() -> None:
    """At exit, multiprocessing sends SIGTERM, which loaders block, and would then wait for them for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _same(found: Any) -> Any:
    return found
