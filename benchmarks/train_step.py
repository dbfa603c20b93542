"""The paper's step of each phase against two bars: the machine's matrix rate, and the share of it that ViTMAE reaches.

    python benchmarks/train_step.py [bridle bench's arguments, such as audio --micro-batch 4 --rounds 5]

Runs `bridle bench` (by default recipe audio, 4 clips a step, 5 rounds), which measures everything in turns in one run,
and prints how each phase stands to the bars.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bridle.cli import main

SHARE, RATIO = 0.55, 1.0


def stands(value: float, bar: float) -> str:
    return f"{value:.2f} ({'reaches' if value >= bar else 'misses'} {bar})"


if __name__ == "__main__":
    given = sys.argv[1:] or ["audio", "--micro-batch", "4", "--no-kernels"]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        if main(["bench", *given, "--json", str(figures)]):
            sys.exit(1)
        for phase in json.loads(figures.read_text())["phases"]:
            ratio = phase["reference"] and stands(phase["share"] / phase["reference"], RATIO)
            print(f"{phase['phase']}: of the matrix rate {stands(phase['share'], SHARE)}; times ViTMAE's {ratio}")
