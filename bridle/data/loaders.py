"""Loader processes, forked from the clean template (`bridle.processes.template`), never from a trainer."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bridle.data.errors import ShardError
from bridle.processes.template import CONTEXT, end_with_parent, kill_at_exit, start_template


def made_by_workers(dataset: Dataset[Any], workers: int, sampler: Sampler[Any] | None = None) -> Iterator[Any]:
    """What `dataset` gives, item by item and as it is; made by `workers` processes, or in this one if 0.

    Processes begin at once, two items ahead each. `dataset` is pickled to them, and the main module is imported there
    again (as `__mp_main__`).

    Raises:
        ShardError: a process died.
    """
    if workers:
        start_template(type(dataset).__module__)
        kill_at_exit()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_end_with_parent,
        multiprocessing_context=CONTEXT if workers else None,
        # Its own generator: else every stream would move torch's global one.
        generator=torch.Generator(),
    )
    with _clear_death(workers, []):
        items = iter(loader)
    return _watched(items, workers)


def _watched(items: Iterator[Any], workers: int) -> Iterator[Any]:
    processes = getattr(items, "_workers", [])
    try:
        with _clear_death(workers, processes):
            yield from items
    except Exception:
        # The error holds what torch would end them with, and torch asks them to end by a signal that they do not hear.
        for process in processes:
            process.kill()
            process.join()
        raise


@contextlib.contextmanager
def _clear_death(workers: int, processes: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _means_dead_loader(error, workers):
            raise
        codes = [process.exitcode for process in processes if process.exitcode]
        raise ShardError(f"a loader process died {_cause(error, min(codes, default=0))}") from None


def _cause(error: Exception, code: int) -> str:
    """How a loader ended, as far as can be told, and what to do about that. code: as multiprocessing has it."""
    ended = signal.Signals(-code) if code < 0 else None
    if ended == signal.SIGKILL:
        return (
            "(SIGKILL), as the kernel ends one where memory runs out; try fewer workers (data.workers) or more memory"
        )
    if ended == signal.SIGBUS:
        return "(SIGBUS): no room in shared memory; try fewer workers, or a larger /dev/shm (docker: --shm-size)"
    if ended in (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
        find = "`bridle shards check SHARDS --modality NAME` decodes each file in a process of its own, and names it"
        return f"({ended.name}): most likely a decoder that crashed on a damaged file; {find}"
    said = " ".join(str(error).split())[:200]
    return f"({ended.name if ended else said}); the lines above may say why. If memory ran out, try fewer workers"


def _means_dead_loader(error: Exception, workers: int) -> bool:
    """torch notices it, or the dead one's tensors cannot be fetched. What a dataset raised is told apart."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return workers > 0 and "in DataLoader worker process" not in str(error)


def _end_with_parent(worker: int) -> None:
    """torch watches the process that a loader was forked from, but the template lives as long as its loaders."""
    end_with_parent()
    sys.excepthook = _say_unless_the_trainer_is_gone


def _say_unless_the_trainer_is_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The thread that hands tensors over prints what it meets, also when the trainer was killed while it took one."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _same(found: Any) -> Any:
    return found
