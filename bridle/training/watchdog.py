"""A rank that hangs is not silence: every rank says where it stands, and the run ends naming those that did not arrive.

All ranks pass the same places in the same order and count them. One that has passed none for the time allowed writes
the stacks of its threads, and asks all others for theirs, over the store where the ranks met: a collective would hang
too. The ranks with the smallest count, or without an answer, are those that the others wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from bridle.training.ranks import Ranks
from bridle.training.rendezvous import ranks_named

LOOK = 2.0
"""Seconds between two looks at the count, and at the alarm of another rank."""
ANSWER = 10.0
"""Seconds that the others have to say where they are."""


@dataclass(frozen=True)
class Report:
    """Where a rank stands. passed: places so far; place: the last; waited: seconds since then."""

    rank: int
    passed: int
    place: str
    waited: float
    stacks: str


class Watchdog:
    """Watches this rank from threads of its own.

    Args:
        timeout: seconds without a new place after which the run ends.
        folder: where stacks go: the run folder's `stacks`; used on machines that have the run folder.
        ending: called before this process ends, with what it says.
    """

    def __init__(self, ranks: Ranks, timeout: float, folder: Path, ending: Callable[[str], None]) -> None:
        self.ranks, self.timeout, self.folder, self.ending = ranks, timeout, folder, ending
        self.passed, self.place, self._since = 0, "the start", time.monotonic()
        self._over, self._alarmed, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="bridle-watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Begins to watch."""
        self.ranks.when_well.append(self.wait_longer)
        self._watcher.start()
        if self.ranks.world > 1:
            threading.Thread(target=self._listen, name="bridle-alarm", daemon=True).start()
        return self

    def close(self) -> None:
        """Stops watching. Where it is ending this process already, peers may be gone first: it has the last word."""
        self._over.set()
        if self._ending.is_set():
            self._watcher.join()

    @property
    def waited(self) -> float:
        """Seconds since this rank passed a place."""
        return time.monotonic() - self._since

    def wait_longer(self) -> None:
        """Rank 0 is alive and at a long job."""
        self._since = time.monotonic()

    def at(self, place: str) -> None:
        """This rank passes a place; all ranks pass the same ones."""
        self.passed += 1
        self.place, self._since = place, time.monotonic()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(min(LOOK, self.timeout / 4)):
            now = time.monotonic()
            if now - looked > self.timeout / 2 + LOOK:
                self._since = now  # this process was suspended itself
            looked = now
            if now - self._since > self.timeout or self._alarmed.is_set():
                self._end()

    def _listen(self) -> None:
        with contextlib.suppress(dist.DistError):
            store = _store()
            while not self._over.wait(LOOK):
                if store.check(["alarm"]):
                    self._alarmed.set()

    def _end(self) -> None:
        self._ending.set()
        mine = Report(self.ranks.rank, self.passed, self.place, self.waited, stacks())
        reports = {mine.rank: mine}
        # In a thread: a store whose server is stopped does not answer, nor say so.
        asking = threading.Thread(target=self._ask, args=(mine, reports), daemon=True)
        asking.start()
        asking.join(ANSWER + LOOK if self.ranks.world > 1 else 0.0)
        self._write(reports)
        said = verdict(reports, self.ranks.world, self.timeout, self.folder)
        with contextlib.suppress(Exception):
            self.ending(said)
        if mine.rank == min(reports):
            print(f"pretrain: error: {said}", file=sys.stderr, flush=True)
        if self.ranks.first:
            time.sleep(LOOK)  # the others read what rank 0's store holds
        os._exit(1)

    def _ask(self, mine: Report, reports: dict[int, Report]) -> None:
        if self.ranks.world == 1:
            return
        with contextlib.suppress(dist.DistError):
            store = _store()
            store.set(f"report/{mine.rank}", json.dumps(asdict(mine)))
            store.set("alarm", "")
            until = time.monotonic() + ANSWER
            while len(reports) < self.ranks.world and time.monotonic() < until:
                for rank in set(range(self.ranks.world)) - reports.keys():
                    if store.check([f"report/{rank}"]):
                        reports[rank] = Report(**json.loads(store.get(f"report/{rank}")))
                time.sleep(0.1)

    def _write(self, reports: dict[int, Report]) -> None:
        """Every rank that has the run folder writes what it has; a rank's own are the same from all."""
        if not self.folder.parent.is_dir():
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            for report in reports.values() if self.ranks.first or 0 not in reports else [reports[self.ranks.rank]]:
                head = f"rank {report.rank} stands at: {report.place}, for {report.waited:.0f} s\n\n"
                (self.folder / f"rank-{report.rank}.txt").write_text(head + report.stacks, encoding="utf-8")


def verdict(reports: dict[int, Report], world: int, timeout: float, folder: Path) -> str:
    """One line: who did not arrive where, and what to do."""
    silent = sorted(set(range(world)) - reports.keys())
    furthest = max(reports.values(), key=lambda report: report.passed)
    behind = sorted(report.rank for report in reports.values() if report.passed < furthest.passed)
    if silent:
        missing = f"{ranks_named(silent)} did not arrive and did not answer (stopped, killed or cut off)"
    elif behind:
        missing = f"{ranks_named(behind)} did not arrive: at '{reports[behind[0]].place}'"
    elif world > 1:
        missing = "all ranks wait at the same place"
    else:
        missing = "this rank hangs"
    return (
        f"nothing went on for {timeout:.0f} s at '{furthest.place}': {missing}; stacks are in {folder}; start the same"
        " command again to go on from the last checkpoint, or raise train.collective_timeout if it was only slow"
    )


def stacks() -> str:
    """The stacks of all threads of this process, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    parts = [f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames]
    return "\n".join(parts)


def _store() -> dist.Store:
    """A connection of its own to the store where the ranks met: the group's may be busy waiting."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=ANSWER)
    return dist.PrefixStore(
        "bridle", dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
    )
