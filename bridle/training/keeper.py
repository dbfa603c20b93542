"""What is written behind training: one job at a time, in a thread of rank 0, while the steps go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from bridle.settings import RecipeError
from bridle.training.metrics import RunLog
from bridle.training.ranks import Ranks

log = logging.getLogger("bridle")
Job = Callable[[], None]


class Keeper:
    """A job that fails for want of disk or network raises an alarm and costs the run nothing else.

    Args:
        push: uploads what was written, where the run folder is in a store; runs behind each job.
    """

    def __init__(self, ranks: Ranks, run_log: RunLog | None = None, push: Job | None = None) -> None:
        self.ranks, self.run_log = ranks, run_log
        self._push_job = push
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bridle-keeper")
        self._write: Future[OSError | None] | None = None
        self._push: Future[OSError | None] | None = None

    def start(self, name: str, job: Job) -> None:
        """Runs `job` behind training, once what was started before is written; on rank 0 only."""
        self.ready()
        if self.ranks.first:
            self._write = self._pool.submit(self._written, name, job)
            self.push()

    def push(self) -> None:
        """Uploads what there is to upload, behind training."""
        if self.ranks.first and self._push_job is not None:
            self._push = self._pool.submit(self._pushed, self._push_job)

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return all(job is None or job.done() for job in (self._write, self._push))

    def ready(self) -> None:
        """Returns when what was started last is on the disk, or could not be written: its memory may be used again.

        Raises what was neither disk nor network, a mistake of ours.
        """
        if self._write is not None:
            self._write.result()

    def settle(self) -> None:
        """Waits until what was started last is on rank 0's disk. All ranks must call it.

        Raises:
            OSError: on all ranks, if it could not be written.
        """
        self.ranks.on_first(lambda: _raise(self._write))

    def deliver(self) -> None:
        """Waits until everything is where it belongs, in the store where there is one. All ranks must call it.

        Raises:
            OSError: on all ranks, if it could not be uploaded; it is on rank 0's disk, and a start there uploads it.
        """

        def delivered() -> None:
            self.ready()
            self.push()
            _raise(self._push)

        self.ranks.on_first(delivered)

    def close(self) -> None:
        """Tries once more to upload what is left, and ends the thread; what failed was said when it did."""
        self.push()
        self._pool.shutdown(wait=True)

    def _written(self, name: str, job: Job) -> OSError | None:
        began = time.perf_counter()
        try:
            if self.run_log is not None:
                self.run_log.flush()  # no checkpoint without the rows before it
            job()
        except OSError as error:
            self._alarm(f"{name} was not written: {error}; training goes on, the next checkpoint tries again")
            return error
        took = time.perf_counter() - began
        if self.run_log is not None:
            self.run_log.prometheus.checkpoint.set(took)
            self.run_log.prometheus.checkpointed.set_to_current_time()
        log.info("%s written in %.1f s", name, took)
        return None

    def _pushed(self, job: Job) -> OSError | None:
        try:
            job()
        except (OSError, RecipeError) as error:
            self._alarm(f"{error}; nothing is lost here, and the next checkpoint tries again")
            return OSError(str(error))
        return None

    def _alarm(self, text: str) -> None:
        if self.run_log is not None:
            self.run_log.prometheus.alarms.labels("checkpoint").inc()
        log.warning("%s", text)


def _raise(job: Future[OSError | None] | None) -> None:
    failure = job.result() if job is not None else None
    if failure is not None:
        raise failure
