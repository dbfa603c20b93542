"""Where a run stands: looked up on rank 0's disk, every file of it checked, and said to all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridle.training.checkpoints import PhaseCheckpoints, damage_of, read_position

log = logging.getLogger("bridle")
SET_ASIDE = "set-aside"


@dataclass(frozen=True)
class Standing:
    """phase: the first that has no whole result (the number of phases, if all have); step: of the checkpoint to go on
    from inside it, none to begin it; damaged: checkpoints and results that were passed over; again: cold starts before
    it without a result, because the run was begun (`--from`) with another quantizer than the results that it took.
    """

    phase: int
    step: int | None = None
    damaged: int = 0
    again: tuple[int, ...] = ()


def find_standing(run: Path, kinds: Sequence[str]) -> Standing:
    """The newest state that is whole; names what is damaged, and what it goes on from instead.

    Phases that were built on a damaged result are moved to ``checkpoints/set-aside``.
    """
    again: list[int] = []
    for index, kind in enumerate(kinds):
        checkpoints = PhaseCheckpoints(run, index, kind)
        damaged: list[str] = []
        if kind == "cold_start" and not checkpoints.is_finished() and _is_inherited(run, index + 1, kinds):
            again.append(index)
            continue
        if checkpoints.is_finished() and _is_whole(checkpoints.finished, damaged):
            continue
        whole = (path for path in reversed(checkpoints.steps()) if _is_whole(path, damaged))
        newest = next(whole, None)
        step = None if newest is None else int(newest.name.removeprefix("step-"))
        if damaged:
            instead = f"goes on from {newest.name}" if newest else "begins again"
            log.warning("%s; phase %d (%s) %s", "; ".join(damaged), index, kind, instead)
        _set_aside(run, [f"phase-{later}-{kinds[later]}" for later in range(index + 1, len(kinds))])
        return Standing(index, step, len(damaged), tuple(again))
    return Standing(len(kinds), again=tuple(again))


def _is_inherited(run: Path, index: int, kinds: Sequence[str]) -> bool:
    """Whether a phase's result was taken from another run."""
    if index >= len(kinds):
        return False
    finished = PhaseCheckpoints(run, index, kinds[index]).finished
    return damage_of(finished) is None and bool(read_position(finished).origin)


def _is_whole(folder: Path, damaged: list[str]) -> bool:
    found = damage_of(folder)
    if found is not None:
        damaged.append(found)
    return found is None


def _set_aside(run: Path, names: list[str]) -> None:
    """Nothing that was trained is deleted; what an earlier fault set aside is kept under a number."""
    for name in names:
        if (run / "checkpoints" / name).is_dir():
            aside = run / "checkpoints" / SET_ASIDE
            aside.mkdir(exist_ok=True)
            number = sum(path.name.startswith(f"{name}.") for path in aside.iterdir())
            target = aside / f"{name}.{number}"
            (run / "checkpoints" / name).rename(target)
            log.warning("checkpoints/%s was built on it and is now %s", name, target)
