"""What data a run was begun with, kept in its folder: it never goes on, unasked, on other data.

The rule for a run that goes on with other data on purpose: from the checkpoint's position on, the order is that of the
new list, from the beginning of an epoch of its own. So from there every sample of the new list comes once (or as often
as its weight says) before any comes again, whatever was seen of it before. Later phases begin with the new list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridle.data.fingerprint import differences, fingerprint
from bridle.data.shards import ShardSet
from bridle.files import read_json, write_json
from bridle.settings import RecipeError
from bridle.training.checkpoints import PhaseCheckpoints, read_position
from bridle.training.ranks import Ranks
from bridle.training.standing import Standing

NAME = "data.json"


class BegunWith:
    """The record of one run folder, and where the present list of shards came into use.

    Rank 0 alone reads and writes it; all ranks must call everything but `write`, and are told.

    Attributes:
        changed: whether the run goes on with other data than before.
        since: phase, and position in it, from which on the present list is in use; phase -1: always.
    """

    def __init__(
        self, folder: Path, shards: ShardSet, heldout: ShardSet | None, ranks: Ranks, *, allow_new: bool
    ) -> None:
        """
        Raises:
            RecipeError: the run was begun with other data, and `allow_new` is false.
        """
        self.folder, self.ranks = folder, ranks
        self._record: dict[str, Any] = {}

        def compare() -> list[Any]:
            self._record = {
                "shards": fingerprint(shards),
                "heldout": None if heldout is None else fingerprint(heldout),
            }
            return self._compare(allow_new)

        self.changed, self.since = ranks.on_first(compare)

    def settle(self, standing: Standing, kinds: Sequence[str]) -> None:
        """Notes where new data comes into use, once it is known where the run goes on."""
        if not self.changed:
            return

        def reached() -> list[int]:
            if standing.step is None:
                return [standing.phase, 0]
            checkpoints = PhaseCheckpoints(self.folder, standing.phase, kinds[standing.phase])
            return [standing.phase, read_position(checkpoints.step(standing.step)).samples]

        self.since = self.ranks.on_first(reached)

    def first_position(self, phase: int, position: int) -> int:
        """Where in a phase that goes on at `position` the order of the present list begins."""
        if phase != self.since[0]:
            return 0
        if position < self.since[1]:  # a damaged checkpoint gave way to one before it
            self.since = [phase, position]
            self.ranks.on_first(self.write)
        return int(self.since[1])

    def write(self) -> None:
        """Keeps the record; rank 0 only."""
        since = {"phase": self.since[0], "samples": self.since[1]}
        write_json(self.folder / NAME, {**self._record, "since": since})

    def _compare(self, allow_new: bool) -> list[Any]:
        """Whether the training data has changed, and `since` as it was."""
        if not (self.folder / NAME).is_file():
            return [False, [-1, 0]]
        before = read_json(self.folder / NAME)
        changed = differences(before["shards"], self._record["shards"])
        heldout = _heldout_differences(before["heldout"], self._record["heldout"])
        found = "; ".join(part for part in (changed, heldout) if part)
        if found and not allow_new:
            fix = (
                "put it back, or go on with what is there now with --allow-new-data (docs/data.md says in which order)"
            )
            raise RecipeError(f"{self.folder} was begun with other data ({found}); {fix}")
        return [bool(changed), [before["since"]["phase"], before["since"]["samples"]]]


def _heldout_differences(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    if before is None or now is None:
        there, here = ("some" if held else "none" for held in (before, now))
        return "" if before == now else f"held-out clips: {there} before, {here} now"
    found = differences(before, now)
    return f"held-out clips: {found}" if found else ""
