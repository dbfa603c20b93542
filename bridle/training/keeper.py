"""What is written behind training: one job at a time, in a thread of rank 0, while the steps go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from bridle.training.metrics import PrometheusMetrics
from bridle.training.ranks import Ranks

log = logging.getLogger("bridle")


class Keeper:
    """A job that fails for want of disk or network raises an alarm and costs the run nothing else."""

    def __init__(self, ranks: Ranks, metrics: PrometheusMetrics | None = None) -> None:
        self.ranks = ranks
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bridle-keeper")
        self._job: Future[None] | None = None
        self._failure: OSError | None = None

    def start(self, name: str, job: Callable[[], None]) -> None:
        """Runs `job` behind training, once the one before is done; on other ranks than the first, not at all."""
        self.wait()
        if self.ranks.first:
            self._job = self._pool.submit(self._run, name, job)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what was neither disk nor network, a mistake of ours."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def settle(self) -> None:
        """Waits for what was started last. All ranks must call it.

        Raises:
            OSError: on all ranks, if it failed.
        """

        def failed() -> None:
            self.wait()
            if self._failure is not None:
                raise self._failure

        self.ranks.on_first(failed)

    def close(self) -> None:
        """Waits, and ends the thread; what failed was said when it did."""
        self._pool.shutdown(wait=True)

    def _run(self, name: str, job: Callable[[], None]) -> None:
        began = time.perf_counter()
        self._failure = None
        try:
            job()
        except OSError as error:
            self._failure = error
            if self.metrics is not None:
                self.metrics.alarms.labels("checkpoint").inc()
            log.warning("%s was not written: %s; training goes on, the next checkpoint tries again", name, error)
        else:
            took = time.perf_counter() - began
            if self.metrics is not None:
                self.metrics.checkpoint.set(took)
                self.metrics.checkpointed.set_to_current_time()
            log.info("%s written in %.1f s", name, took)
