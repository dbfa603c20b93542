"""`--from RUN[:PHASE[:STEP]]`: a new run, of a recipe of its own, that begins with what another one had learned."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from bridle.config import Recipe
from bridle.files import read_json, whole_folder, write_json
from bridle.settings import RecipeError
from bridle.training.checkpoints import PhaseCheckpoints, read_position
from bridle.training.manifest import NAME, check_folder, write_manifest
from bridle.training.remote_run import on_disk
from bridle.training.run_folder import read_run_recipe

FILE = "from.json"


def begin_from(origin: str, folder: Path, recipe: Recipe) -> None:
    """Copies what `origin` names into a new run folder, checked, and marked as not trained here.

    origin: ``RUN`` (where it stands), ``RUN:PHASE`` (that phase's result, or its newest checkpoint if it has none yet)
    or ``RUN:PHASE:STEP``; RUN a folder or a URL. A folder that was begun from the same origin is left as it is.

    Raises:
        RecipeError: no such run, phase or checkpoint; a recipe with other phases before it, or none behind it; a folder
            that was begun otherwise.
        CheckpointError: what it names is damaged.
    """
    if (folder / "recipe.yaml").is_file():
        _check_same_origin(origin, folder)
        return
    run, phase, step = parse_origin(origin)
    with on_disk(run) as source:
        there = read_run_recipe(source)
        theirs = [PhaseCheckpoints(source, index, found.kind) for index, found in enumerate(there.phases)]
        phase, step = _chosen(origin, theirs, phase, step)
        _check_phases(origin, there, recipe, phase, step)
        ours = [PhaseCheckpoints(folder, index, found.kind) for index, found in enumerate(recipe.phases)]
        other_codebooks = there.model.quantizer != recipe.model.quantizer
        for index in range(phase if step is not None else phase + 1):
            if other_codebooks and recipe.phases[index].kind == "cold_start" and index < phase and step is None:
                continue  # made again, of this run's codebooks
            _copy(theirs[index].finished, ours[index].finished, origin)
        if step is not None:
            _copy(theirs[phase].step(step), ours[phase].step(step), "")
        write_json(folder / FILE, {"from": origin, "run": run, "phase": phase, "step": step})


def parse_origin(origin: str) -> tuple[str, int | None, int | None]:
    """``RUN[:PHASE[:STEP]]`` in its parts; a colon that no number follows belongs to RUN."""
    found = re.fullmatch(r"(.+?)(?::(\d+)(?::(\d+))?)?", origin)
    if found is None:
        raise RecipeError("--from: empty; expected RUN, RUN:PHASE or RUN:PHASE:STEP")
    phase, step = (None if part is None else int(part) for part in found.groups()[1:])
    return found[1], phase, step


def _chosen(origin: str, phases: list[PhaseCheckpoints], phase: int | None, step: int | None) -> tuple[int, int | None]:
    """Phase, and the step of a checkpoint inside it (none: its result)."""
    if phase is None:
        begun = [index for index, found in enumerate(phases) if found.is_finished() or found.steps()]
        if not begun:
            raise RecipeError(f"--from {origin}: that run has no checkpoint yet")
        phase = begun[-1]
    if phase >= len(phases):
        raise RecipeError(f"--from {origin}: that run has phases 0 to {len(phases) - 1}")
    steps = [int(path.name.removeprefix("step-")) for path in phases[phase].steps()]
    if step is None and phases[phase].is_finished():
        return phase, None
    if step is None and steps:
        return phase, steps[-1]
    if step not in steps:
        result = "its result" if phases[phase].is_finished() else "no result yet"
        raise RecipeError(
            f"--from {origin}: phase {phase} has checkpoints {', '.join(map(str, steps)) or 'none'}, and {result}"
        )
    return phase, step


def _check_phases(origin: str, there: Recipe, here: Recipe, phase: int, step: int | None) -> None:
    kinds = [[found.kind for found in recipe.phases[: phase + 1]] for recipe in (there, here)]
    if kinds[0] != kinds[1]:
        raise RecipeError(
            f"--from {origin}: its phases up to {phase} are {', '.join(kinds[0])}, those of this recipe"
            f" {', '.join(kinds[1])}; they must be of the same kinds"
        )
    if step is None and len(here.phases) == phase + 1:
        raise RecipeError(f"--from {origin}: the recipe has no phase behind {phase}, so nothing is left to train")


def _copy(source: Path, target: Path, origin: str) -> None:
    """A checked copy with a manifest of its own, since its state says where it comes from."""
    if not source.is_dir():
        raise RecipeError(f"--from: {source} is not there, and what comes after it needs it")
    check_folder(source)
    with whole_folder(target) as aside:
        for file in source.iterdir():
            if file.name != NAME:
                shutil.copyfile(file, aside / file.name)
        if origin:
            state = replace(read_position(source), origin=origin)
            (aside / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        write_manifest(aside)


def _check_same_origin(origin: str, folder: Path) -> None:
    found = read_json(folder / FILE) if (folder / FILE).is_file() else {}
    before = found.get("from") if isinstance(found, dict) else None
    if before != origin:
        how = f"from {before}" if before else "without --from"
        raise RecipeError(f"--from {origin}: {folder} was begun {how}; go on with it as it is, or give another --run")
