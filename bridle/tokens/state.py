"""What is done of a bulk job, by whomever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bridle.errors import MistakeError
from bridle.tokens.bulk import Prepared
from bridle.tokens.formats import DATA
from bridle.tokens.parts import PARTS, Part, read_parts, refuse_changed, whole

FEW = 100
"""Samples below which the share of skipped ones says little; the job's end counts whatever there is."""


class TooManySkippedError(MistakeError):
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
class State:
    """Which units are done. max_corrupt: share of samples that may be skipped. told: see `Told`."""

    prepared: Prepared
    max_corrupt: float
    told: Told = lambda progress, part: None
    parts: dict[int, Part] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @property
    def missing(self) -> list[int]:
        """Units that nobody is known to have done."""
        return [unit for unit in range(len(self.prepared.inputs.units)) if unit not in self.parts]

    def look(self) -> None:
        """Notices units that are done, by an earlier run or by another process.

        Raises:
            ValueError: an input has changed since it was tokenized.
            OSError: see `Store`.
        """
        store, inputs = self.prepared.store, self.prepared.inputs
        listed = {name.removesuffix(".json") for name in store.sizes(PARTS)}
        found = [unit for unit in self.missing if inputs.units[unit].name in listed]
        if not found:
            return
        sizes = store.sizes(DATA)
        for unit, part in zip(found, read_parts(store, [inputs.units[unit].name for unit in found]), strict=True):
            if part is not None and whole(part, sizes):
                refuse_changed(store, inputs, unit, part)
                self.add(unit, part, here=False)

    def add(self, unit: int, part: Part, here: bool) -> None:
        """A unit is done; here: by this run.

        Raises:
            TooManySkippedError: more than `max_corrupt`, where there is enough to judge by.
        """
        self.parts[unit] = part
        self.progress.done += 1
        self.progress.samples += part.samples + len(part.skipped)
        self.progress.skipped += len(part.skipped)
        if here:
            self.progress.codes += part.codes
            self.progress.tokens += part.tokens
        self.told(self.progress, part if here else None)
        if here and self.progress.samples >= FEW:
            self.check_skipped()

    def in_order(self) -> list[Part]:
        """The parts of all units, when all are done.

        Raises:
            TooManySkippedError: more than `max_corrupt`.
        """
        self.check_skipped()
        return [self.parts[unit] for unit in range(len(self.prepared.inputs.units))]

    def check_skipped(self) -> None:
        """Raises TooManySkippedError if it is so."""
        progress = self.progress
        if progress.skipped > self.max_corrupt * progress.samples:
            first = next((skip for part in self.parts.values() for skip in part.skipped), None)
            example = f"the first: {first['key']}: {first['reason']}; " if first else ""
            raise TooManySkippedError(
                f"{progress.skipped} of {progress.samples} samples could not be read, more than --max-corrupt "
                f"{self.max_corrupt:g}; {example}what is done stays, parts/ names them; raise --max-corrupt to go on"
            )
