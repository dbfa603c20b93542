"""One bulk job in one output folder: what it is, what is done, and the loop that does the rest.

::

    job.json             the model and the settings; another model or other settings are refused
    vocabulary.json      the id space; tokenizer/ the same for transformers
    data/NAME.*          one output per input shard, or per group of files
    parts/NAME.json      its counts, hashes and skipped samples, written when it is whole
    claims/NAME.json     who is at it
    manifest.json        all parts and their sums, when everything is done
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from bridle.model_folder import BridleModel
from bridle.tokens.bulk import Prepared
from bridle.tokens.claims import Claims
from bridle.tokens.engine import Engine, Finished
from bridle.tokens.formats import DATA, write_unit
from bridle.tokens.parts import PARTS, Part, read_parts, refuse_changed, whole

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
WRITES_AHEAD = 2
FEW = 100
"""Samples below which the share of skipped ones says little; the job's end counts whatever there is."""


class TooManySkippedError(ValueError):
    """More samples than `max_corrupt` allows could not be read."""


@dataclass
class Progress:
    """What is known while a job runs. done: units; samples, skipped: of them; codes, tokens: written in this run."""

    done: int = 0
    samples: int = 0
    skipped: int = 0
    codes: int = 0
    tokens: int = 0


Told = Callable[[Progress, Part | None], None]
"""Called when a unit is done, by this process (then with its part) or by another (none)."""


@dataclass
class Job:
    """Everything that one process needs to work on a job.

    rank, world: of this process, which only say where it begins. lease_s: see `Claims`. max_corrupt: share of samples
    that may be skipped. told: see `Told`.
    """

    prepared: Prepared
    model: BridleModel
    workers: int
    max_corrupt: float
    rank: int = 0
    world: int = 1
    lease_s: float = 60.0
    parts: dict[int, Part] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    told: Told = lambda progress, part: None

    def __post_init__(self) -> None:
        self.store, self.inputs = self.prepared.store, self.prepared.inputs
        self.engine = Engine(self.model, self.inputs, batch=self.prepared.batch, workers=self.workers)

    def run(self) -> list[Part]:
        """Does what is not done yet, waits for what others are at, and takes over what a lost one left.

        Returns:
            The parts of all units, in their order.

        Raises:
            TooManySkippedError: more than `max_corrupt`.
            ShardError, OSError: an input or the output cannot be had; what is done stays.
            ValueError: an input has changed since it was tokenized.
        """
        with Claims(self.store, self.rank, self.lease_s) as claims:
            self._look()
            waited = False
            while len(self.parts) < len(self.inputs.units):
                did = self._work(claims)
                self._look()
                if not did and len(self.parts) < len(self.inputs.units):
                    if not waited:
                        left = len(self.inputs.units) - len(self.parts)
                        log.info("waiting for %d units that other processes are at", left)
                        waited = True
                    time.sleep(POLL_SECONDS)
        self._check_skipped(at_least=1)
        return [self.parts[unit] for unit in range(len(self.inputs.units))]

    def _look(self) -> None:
        """Notices units that are done, by an earlier run or by another process."""
        listed = {name.removesuffix(".json") for name in self.store.sizes(PARTS)}
        missing = [u for u, unit in enumerate(self.inputs.units) if u not in self.parts and unit.name in listed]
        if not missing:
            return
        sizes = self.store.sizes(DATA)
        names = [self.inputs.units[unit].name for unit in missing]
        for unit, part in zip(missing, read_parts(self.store, names), strict=True):
            if part is not None and whole(part, sizes):
                refuse_changed(self.store, self.inputs, unit, part)
                self._done(unit, part, here=False)

    def _done(self, unit: int, part: Part, here: bool) -> None:
        self.parts[unit] = part
        self.progress.done += 1
        self.progress.samples += part.samples + len(part.skipped)
        self.progress.skipped += len(part.skipped)
        if here:
            self.progress.codes += part.codes
            self.progress.tokens += part.tokens
        self.told(self.progress, part if here else None)

    def _work(self, claims: Claims) -> int:
        """One pass over all units that nobody has done or claimed; how many were done."""
        units = self._claimed(claims)
        first = next(units, None)
        if first is None:
            return 0
        written: list[tuple[int, Future[Part]]] = []
        did = 0
        with ThreadPoolExecutor(1, "bridle-write") as pool:
            try:
                for finished in self.engine.run(itertools.chain([first], units)):
                    written.append((finished.unit, pool.submit(self._write, finished, claims)))
                    while len(written) > WRITES_AHEAD or (written and written[0][1].done()):
                        did += self._collect(*written.pop(0))
                for unit, future in written:
                    did += self._collect(unit, future)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return did

    def _collect(self, unit: int, future: Future[Part]) -> int:
        self._done(unit, future.result(), here=True)
        self._check_skipped(at_least=FEW)
        return 1

    def _claimed(self, claims: Claims) -> Iterator[int]:
        """Units that this process now owns: its own share first, then what others have not begun."""
        count = len(self.inputs.units)
        own = range(self.rank % self.world, count, self.world)
        for unit in [*own, *(u for u in range(count) if u % self.world != self.rank % self.world)]:
            name = self.inputs.units[unit].name
            if unit not in self.parts and claims.take(name):
                if self.store.read(f"{PARTS}/{name}.json") is not None and self._done_meanwhile(unit):
                    claims.release(name)
                    continue
                yield unit

    def _done_meanwhile(self, unit: int) -> bool:
        (part,) = read_parts(self.store, [self.inputs.units[unit].name])
        return part is not None and whole(part, self.store.sizes(DATA))

    def _write(self, finished: Finished, claims: Claims) -> Part:
        part = write_part(self.prepared, finished)
        claims.release(part.name)
        return part

    def _check_skipped(self, at_least: int) -> None:
        progress = self.progress
        if progress.samples >= at_least and progress.skipped > self.max_corrupt * progress.samples:
            first = next((s for part in self.parts.values() for s in part.skipped), None)
            example = f"the first: {first['key']}: {first['reason']}; " if first else ""
            raise TooManySkippedError(
                f"{progress.skipped} of {progress.samples} samples could not be read, more than --max-corrupt "
                f"{self.max_corrupt:g}; {example}what is done stays, parts/ names them; raise --max-corrupt to go on"
            )


def write_part(prepared: Prepared, finished: Finished) -> Part:
    """Writes a unit's data first, then the part that says so.

    Raises:
        OSError: see `Store.put`.
    """
    unit = prepared.inputs.units[finished.unit]
    written = write_unit(prepared.store, unit.name, prepared.kind, finished.records, prepared.documents)
    part = Part.of(unit, prepared.inputs.digest(finished.unit), finished, written)
    prepared.store.put_json(f"{PARTS}/{unit.name}.json", part.as_json())
    return part
