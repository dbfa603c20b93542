"""What a run folder says of the run, finished or still going: recipe, environment, rows of metrics, models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bridle.config import (
    ColdStartPhase,
    EncoderPhase,
    JointPhase,
    Recipe,
    TokenizerPhase,
    recipe_from_mapping,
    refuse_finetuning,
)
from bridle.errors import MistakeError
from bridle.files import read_json
from bridle.recipe_files import RUN_RECIPE, read_run_recipe_file

NEEDED = {"phase_index", "split", "step", "loss", "codebook_usage"}


@dataclass(frozen=True)
class PhaseRows:
    """One trained phase and its rows, in the order of steps.

    train: means over the steps since the row before; heldout: over the held-out clips.
    """

    index: int
    settings: EncoderPhase | TokenizerPhase | JointPhase
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        """`encoder`, `tokenizer` or `joint`."""
        return self.settings.kind

    @property
    def name(self) -> str:
        """For people."""
        return f"phase {self.index}: {self.kind}"


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    phases: those that have rows; damaged_rows: lines of metrics.jsonl that are no row (a run killed while writing one
    leaves one); written: when metrics.jsonl last grew, none before the first row.
    """

    path: Path
    recipe: Recipe
    recipe_text: str
    environment: dict[str, Any]
    ds_config: dict[str, Any]
    phases: list[PhaseRows]
    damaged_rows: int
    written: datetime | None

    @property
    def finished(self) -> bool:
        """Whether the last encoder phase has left its model."""
        return (self.path / "models" / "final" / "config.json").is_file()

    @property
    def newest_model(self) -> Path | None:
        """Model folder of the newest iteration; none before the first."""
        found = [path for path in (self.path / "models").glob("iteration-*") if (path / "config.json").is_file()]
        numbered = [(int(path.name.removeprefix("iteration-")), path) for path in found if path.name[10:].isdigit()]
        return max(numbered)[1] if numbered else None


def read_run(path: Path) -> RunFolder:
    """Reads a run folder; what is not written yet is empty.

    Raises:
        RecipeError: no run there, or its recipe cannot be read.
        ValueError: another of its files is damaged.
    """
    raw, text = read_run_recipe_file(path)
    refuse_finetuning(raw, str(path))
    recipe = recipe_from_mapping(raw, str(path / RUN_RECIPE))
    metrics = path / "metrics.jsonl"
    rows, damaged = _read_rows(metrics, len(recipe.phases))
    return RunFolder(
        path=path,
        recipe=recipe,
        recipe_text=text,
        environment=_read_object(path / "environment.json"),
        ds_config=_read_object(path / "ds_config.json"),
        phases=_by_phase(recipe, rows),
        damaged_rows=damaged,
        written=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None,
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise MistakeError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def _read_rows(path: Path, phases: int) -> tuple[list[dict[str, Any]], int]:
    if not path.is_file():
        return [], 0
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and row.keys() >= NEEDED and row["phase_index"] in range(phases):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _by_phase(recipe: Recipe, rows: list[dict[str, Any]]) -> list[PhaseRows]:
    found = []
    for index, settings in enumerate(recipe.phases):
        of_phase = [row for row in rows if row["phase_index"] == index]
        if of_phase and not isinstance(settings, ColdStartPhase):
            split = {name: [row for row in of_phase if row["split"] == name] for name in ("train", "heldout")}
            found.append(PhaseRows(index, settings, split["train"], split["heldout"]))
    return found
