"""How a run is, from its folder alone: read by `bridle status`, on any machine that reaches the folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bridle.files import write_json
from bridle.recipe_files import RUN_RECIPE, no_run, parse_recipe
from bridle.remote.access import is_url
from bridle.remote.store import RemoteStore
from bridle.training.lock import NAME as LOCK
from bridle.training.lock import STALE, Holder

ENDED = "ended.json"
"""How the last run in a folder ended; it says nothing while another one holds the lock, or left it behind."""
CODES = {"running": 0, "finished": 3, "stopped": 4, "dead": 5}
"""Exit codes of `bridle status`."""
STEP = re.compile(r"checkpoints/(phase-(\d+)-\w+/step-(\d+))/manifest\.json")
"""What makes a checkpoint whole; those that were set aside count no more."""
LOOK = 1.0
"""Seconds between two looks at a heartbeat that may have stopped."""


class RunFiles(Protocol):
    """A run folder's files, wherever it is."""

    def names(self) -> Iterable[str]:
        """Relative names of all files."""

    def read(self, name: str) -> str | None:
        """A file's text; none where there is none."""


class LocalRunFiles:
    """See RunFiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> Iterable[str]:
        """See RunFiles."""
        return [path.relative_to(self.folder).as_posix() for path in self.folder.glob("[cm]*/*/**/*") if path.is_file()]

    def read(self, name: str) -> str | None:
        """See RunFiles."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


class RemoteRunFiles:
    """See RunFiles."""

    def __init__(self, url: str) -> None:
        self.store = RemoteStore(url)

    def names(self) -> Iterable[str]:
        """See RunFiles."""
        return self.store.list()

    def read(self, name: str) -> str | None:
        """See RunFiles."""
        return self.store.read_text(name)


@dataclass
class Status:
    """state: a key of CODES; holder: whoever trains, or trained until it died; train, heldout: the newest rows of
    metrics; phases: their kinds; finished: how many are; checkpoint: the newest; said: how the last run ended."""

    state: str
    run: str
    phases: list[str]
    finished: int
    holder: Holder | None = None
    train: dict[str, Any] = field(default_factory=dict)
    heldout: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    said: str | None = None

    @property
    def code(self) -> int:
        """The exit code of `bridle status`."""
        return CODES[self.state]

    @property
    def seconds_left(self) -> float | None:
        """Until the end of the phase, at the rate of the newest row; none where it is not running inside one."""
        if self.state != "running" or "total_steps" not in self.train:
            return None
        return (self.train["total_steps"] - self.train["step"]) * float(self.train["step_seconds"])

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        holder = self.holder
        return {
            "state": self.state,
            "run": self.run,
            "phases": self.phases,
            "phases_finished": self.finished,
            "seconds_left": self.seconds_left,
            "checkpoint": self.checkpoint,
            "host": holder.host if holder else None,
            "pid": holder.pid if holder else None,
            "heartbeat": holder.heartbeat if holder else None,
            "at": holder.says.get("at") if holder else None,
            "alarms": holder.says.get("alarms", {}) if holder else {},
            "train": self.train,
            "heldout": self.heldout,
            "said": self.said,
        }


def look(run: str) -> Status:
    """Looks at a run folder, or a URL of one.

    Takes up to 60 seconds where the holder is on another machine and its heartbeat looks old: it is then watched.

    Raises:
        RecipeError: no run there.
    """
    files: RunFiles = RemoteRunFiles(run) if is_url(run) else LocalRunFiles(Path(run))
    text = files.read(RUN_RECIPE)
    holder = Holder.read(files.read(LOCK))
    if text is None and holder is None:
        raise no_run(run)
    names = set(files.names())
    recipe = {"phases": []} if text is None else parse_recipe(text, f"{run}/{RUN_RECIPE}")
    kinds = [str(phase["kind"]) for phase in recipe["phases"]]
    finished = 0
    while finished < len(kinds) and f"checkpoints/phase-{finished}-{kinds[finished]}/finished/manifest.json" in names:
        finished += 1
    train, heldout = _newest_rows(files.read("metrics.jsonl") or "")
    checkpoints = sorted((int(found[2]), int(found[3]), found[1]) for found in map(STEP.fullmatch, names) if found)
    status = Status(
        "stopped", run, kinds, finished, holder, train, heldout,
        checkpoints[-1][2] if checkpoints else None,
    )  # fmt: skip
    if holder is not None:
        status.state = "running" if _lives(holder, files) else "dead"
        return status
    ended = json.loads(files.read(ENDED) or "{}")
    left = "models/final/config.json" in names or files.read("classifier/config.json") is not None
    if kinds and finished == len(kinds) and left:
        status.state = "finished"
    elif ended.get("failed"):
        status.state, status.said = "dead", ended["said"]
    else:
        status.said = ended.get("said")
    return status


def note_end(folder: Path, said: str, failed: bool) -> None:
    """Leaves word of how a run ended."""
    write_json(folder / ENDED, {"said": said, "failed": failed, "at": time.time()})


def _newest_rows(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest of training and of held-out clips; a torn last line is not read."""
    found: dict[str, dict[str, Any]] = {"train": {}, "heldout": {}}
    for line in reversed(text.splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and not found.get(row.get("split", ""), row):
            found[row["split"]] = row
        if all(found.values()):
            break
    return found["train"], found["heldout"]


def _lives(holder: Holder, files: RunFiles) -> bool:
    """Looked up where it can be; else its heartbeat is young by our clock, or moves while we watch."""
    if holder.is_here():
        return holder.lives()
    until = time.monotonic() + STALE
    while abs(time.time() - holder.heartbeat) > STALE:
        if time.monotonic() > until:
            return False
        time.sleep(LOOK)
        now = Holder.read(files.read(LOCK))
        if now is None:
            return False
        if now.heartbeat != holder.heartbeat:
            return True
    return True
