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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from bridle.model_folder import BridleModel
from bridle.tokens.bulk import Prepared
from bridle.tokens.claims import FOLDER as CLAIMS
from bridle.tokens.claims import Claims
from bridle.tokens.engine import Engine, Finished
from bridle.tokens.formats import DATA, write_unit
from bridle.tokens.parts import PARTS, Part, read_parts, whole
from bridle.tokens.state import State

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
WRITES_AHEAD = 2


@dataclass
class Job:
    """Everything that one process needs to work on a job.

    rank, world: of this process, which only say where it begins. lease_s: see `Claims`.
    """

    state: State
    model: BridleModel
    workers: int
    rank: int = 0
    world: int = 1
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        self.prepared = self.state.prepared
        self.engine = Engine(self.model, self.prepared.inputs, batch=self.prepared.batch, workers=self.workers)

    def run(self) -> list[Part]:
        """Does what is not done yet, waits for what others are at, and takes over what a lost one left.

        Returns:
            The parts of all units, in their order.

        Raises:
            TooManySkippedError: more than `max_corrupt`.
            ShardError, OSError: an input or the output cannot be had; what is done stays.
            ValueError: an input has changed since it was tokenized.
        """
        waited = False
        with Claims(self.prepared.store, self.rank, self.lease_s) as claims:
            self.state.look()
            while self.state.missing:
                did = self._work(claims)
                self.state.look()
                if not did and self.state.missing:
                    if not waited:
                        log.info("waiting for %d units that other processes are at", len(self.state.missing))
                        waited = True
                    time.sleep(POLL_SECONDS)
        for claim in self.prepared.store.sizes(CLAIMS):  # an owner was killed between its part and its claim's end
            self.prepared.store.delete(f"{CLAIMS}/{claim}")
        for folder in (DATA, PARTS, CLAIMS):
            self.prepared.store.sweep(folder, self.lease_s)
        return self.state.in_order()

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
        self.state.add(unit, future.result(), here=True)
        return 1

    def _claimed(self, claims: Claims) -> Iterator[int]:
        """Units that this process now owns: its own share first, then what others have not begun."""
        count, first = len(self.prepared.inputs.units), self.rank % self.world
        own = range(first, count, self.world)
        for unit in [*own, *(unit for unit in range(count) if unit % self.world != first)]:
            name = self.prepared.inputs.units[unit].name
            if unit in self.state.parts or not claims.take(name):
                continue
            if self._done_meanwhile(name):
                claims.release(name)
            else:
                yield unit

    def _done_meanwhile(self, name: str) -> bool:
        store = self.prepared.store
        (part,) = read_parts(store, [name])
        return part is not None and whole(part, store.sizes(DATA))

    def _write(self, finished: Finished, claims: Claims) -> Part:
        part = write_part(self.prepared, finished)
        claims.release(part.name)
        return part


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
