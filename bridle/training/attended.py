"""A training process from its start to its exit code: signals, the run folder's lock, the other ranks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bridle.training.foreign_warnings import NAME as WARNINGS
from bridle.training.foreign_warnings import ForeignWarnings
from bridle.training.stopping import STOPPED, StoppedError, StopRequest

log = logging.getLogger("bridle")


def attended(
    program: str,
    where: str,
    patience: float,
    make: Callable[..., Any],
    stop: StopRequest,
    foreign: ForeignWarnings,
    loaders: Sequence[str] = (),
) -> int:
    """Takes the run folder's lock, meets the other ranks and runs.

    where: folder or URL of the run; patience: seconds to wait for other ranks; make: the run, of `folder`, `ranks`,
    `stop`, `lock` and `store`; loaders: modules that loader processes need, none without such processes.

    Returns:
        0 when the run is done, 75 when it was asked to stop or another rank was lost.
    """
    from bridle.processes.template import start_template
    from bridle.remote.access import is_url
    from bridle.training.lock import LocalLockFile, RunLock
    from bridle.training.ranks import is_lost_peer
    from bridle.training.remote_run import RemoteRun
    from bridle.training.rendezvous import join, leave

    store = RemoteRun(where) if is_url(where) else None
    folder = store.folder if store else Path(where)
    lock = RunLock(store.lock_file() if store else LocalLockFile(folder), where, lost=_end_at_once(program))
    try:
        stop.before_leaving.append(lock.release)
        if loaders:
            start_template(*loaders)
        ranks = join(patience, admit=lock.acquire)
        run = make(folder=folder, ranks=ranks, stop=stop, lock=lock, store=store)
        foreign.file = folder / WARNINGS if ranks.first else None
        with stop.deferred():
            run.run()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(
            f"{program}: error: lost another rank, which stopped or was killed; what it printed says why."
            " Start the same command again to go on from the last checkpoint",
            file=sys.stderr,
        )
        return STOPPED  # the rank that was lost has the exit code that counts
    except StoppedError:
        reason = stop.reason or "a signal to another rank"
        log.info("stopped by %s; the same command goes on from there (%s)", reason, where)
        return STOPPED
    finally:
        foreign.flush()
        leave()
        lock.release()
    return 0


def _end_at_once(program: str) -> Callable[[str], None]:
    """Ends this process where nothing may be written any more; its peers notice."""

    def end(why: str) -> None:
        print(f"{program}: error: {why}; nothing more was written", file=sys.stderr, flush=True)
        os._exit(1)

    return end
