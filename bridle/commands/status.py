"""`bridle status RUN`: how a run is, for people and, by its exit code, for scripts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridle.training.status import Status

HELP = "say how a run is: exit code 0 running, 3 finished, 4 stopped, 5 dead"
EVERY = 2.0
"""Seconds between two looks of --watch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/audio-mini or s3://bucket/prefix")
    parser.add_argument("--watch", action="store_true", help="look again every 2 seconds until it no longer runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object a look")


def run(args: argparse.Namespace) -> int:
    """Prints how it is.

    Raises:
        RecipeError: no run there.
    """
    from bridle.training.status import look

    while True:
        status = look(args.run)
        if args.watch and not args.json and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(json.dumps(status.as_json()) if args.json else "\n".join(lines(status)), flush=True)
        if not args.watch or status.state != "running":
            return status.code
        time.sleep(EVERY)


def lines(status: Status) -> list[str]:
    """What a person reads."""
    holder, train, now = status.holder, status.train, time.time()
    found = [f"{status.run}: {status.state}" + (f" ({status.said})" if status.said else "")]
    if holder is not None:
        what = "held by" if status.state == "running" else "was held by"
        found.append(f"  {what} {holder}; heartbeat {_duration(now - holder.heartbeat)} ago")
    if holder is not None and "at" in holder.says:
        found.append(f"  at         {holder.says['at']}, for {_duration(holder.says['waited'])}")
    found.append(f"  phases     {status.finished} of {len(status.phases)} finished ({', '.join(status.phases)})")
    if train:
        of = f" of {train['total_steps']}" if "total_steps" in train else ""
        left = status.seconds_left
        eta = "" if left is None else f"; {_duration(left)} left in this phase"
        found.append(f"  step       {train['step']}{of} in phase {train['phase_index']} ({train['phase']}){eta}")
        rate = f"{train['samples_per_second']:.1f} clips/s, {train['step_seconds']:.3f} s a step"
        found.append(f"  rate       {rate}, {100 * train['data_wait']:.0f}% waiting for clips")
        found.append(f"  trained    {_figures(train)}")
    if status.heldout:
        where = f"phase {status.heldout['phase_index']}, step {status.heldout['step']}"
        found.append(f"  held out   {_figures(status.heldout)} ({where})")
    found.append(f"  checkpoint {status.checkpoint or 'none inside a phase'}")
    alarms = {kind: count for kind, count in (holder.says.get("alarms", {}) if holder else {}).items() if count}
    said = ", ".join(f"{kind} {count:.0f}" for kind, count in alarms.items()) or "none"
    found.append(f"  health     {train.get('corrupt', 0)} corrupt samples; alarms: {said}")
    return found


def _figures(row: dict) -> str:
    parts = [f"loss {row['loss']:.4f}"]
    for key in ("accuracy", "cosine", "codebook_usage"):
        if key in row:
            values = row[key] if isinstance(row[key], list) else [row[key]]
            parts.append(f"{key.replace('_', ' ')} " + " ".join(f"{value:.3f}" for value in values))
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours or minutes else f"{rest} s"
