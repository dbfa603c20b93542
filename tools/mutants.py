"""Faults put in on purpose, one after another, and whether the tests nearest to them notice: `make mutants`.

    python tools/mutants.py [--count 60] [--seed 0] [--seconds 300] [--only modeling]

cosmic-ray (PyPI) makes the faults, in a copy of the tree under build/; of each room's, `--count` are drawn. Prints the
share that tests caught and each that none did, as a diff. Hours for all of them: `--count 100000`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkItem

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
MEANINGLESS = ("ReplaceBinaryOperator_BitOr", "RemoveDecorator")
"""Kinds of fault left out: `|` stands in annotations almost everywhere, which nothing evaluates."""
SECONDS = 300.0
"""Time for a room's tests; those that take longer have noticed."""


@dataclass(frozen=True)
class Room:
    """Files to put faults into, and the tests nearest to them."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


ROOMS = {
    "modeling": Room(("bridle/modeling",), ("tests/modeling", "tests/training/test_phases.py")),
    "order": Room(("bridle/data/order.py",), ("tests/data/test_sample_order.py", "tests/data/test_mixed_sources.py")),
    "stream": Room(("bridle/data/stream.py",), ("tests/data/test_data_stream.py",)),
    "phases": Room(
        ("bridle/training/phases.py", "bridle/training/joint.py", "bridle/training/clips.py"),
        ("tests/training/test_phases.py", "tests/modeling/test_padding.py", "tests/training/test_joint.py"),
    ),
    "service": Room(
        (
            *(f"serving/web/{name}.py" for name in ("admission", "counts", "keys", "npz", "problems", "uploads")),
            *(f"serving/engine/{name}.py" for name in ("batching", "cores", "turns", "work")),
        ),
        tuple(
            f"tests/serving/test_{name}.py"
            for name in (
                *("batching", "cores", "turns", "work", "door_edges", "door_parts"),
                *("fair_parts", "hostile_npz", "http_process_parts", "problems"),
            )
        ),
    ),
    "health": Room(("bridle/evaluation/health.py",), ("tests/evaluation/test_health.py",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a room's tests; longer counts as caught")
    parser.add_argument("--only", choices=sorted(ROOMS))
    args = parser.parse_args()
    copy_tree()
    os.chdir(COPY)
    os.environ["PYTHONPATH"] = str(COPY)
    caught = drawn = 0
    for name, room in ROOMS.items():
        if args.only in (None, name):
            found, total = survey(name, room, args)
            caught, drawn = caught + found, drawn + total
    print(f"all: {caught} of {drawn} caught ({caught / max(1, drawn):.3f})")
    return 0


def copy_tree() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        target = COPY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def survey(name: str, room: Room, args: argparse.Namespace) -> tuple[int, int]:
    """How many of the drawn faults were caught, and how many there were."""
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -m 'not slow' {' '.join(room.tests)}"
    if subprocess.run(command, shell=True, capture_output=True, check=False).returncode:
        sys.exit(f"{name}: the tests fail without a fault: {command}")
    files = [
        path for root in room.files for path in ([Path(root)] if root.endswith(".py") else Path(root).glob("*.py"))
    ]
    with use_db(str(COPY / f"{name}.sqlite"), WorkDB.Mode.create) as database:
        init(sorted(files), database, {})
        items: list[WorkItem] = [item for item in database.work_items if meaningful(item)]
    items.sort(key=lambda item: str(item.mutations))
    chosen = random.Random(args.seed).sample(items, min(args.count, len(items)))
    caught = 0
    for number, item in enumerate(chosen, start=1):
        result = mutate_and_test(item.mutations, command, args.seconds)
        caught += result.is_killed
        if not result.is_killed:
            print(result.diff, flush=True)
        print(f"{name}: {caught} of {number} caught, of {len(items)} possible", file=sys.stderr, flush=True)
    print(f"{name}: {caught} of {len(chosen)} caught ({caught / max(1, len(chosen)):.3f})", flush=True)
    return caught, len(chosen)


def meaningful(item: WorkItem) -> bool:
    return not any(word in mutation.operator_name for mutation in item.mutations for word in MEANINGLESS)


if __name__ == "__main__":
    sys.exit(main())
