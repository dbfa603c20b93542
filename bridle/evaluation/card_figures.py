"""What a model's card says of its run: the last held-out row, and the probe that lies beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridle.evaluation.probe import spelled, verdicts
from bridle.evaluation.probe_page import score_rows
from bridle.evaluation.run_folder import read_run
from bridle.files import read_json

log = logging.getLogger("bridle")
PROBE = "probe.json"
NOT_FIGURES = {"phase", "phase_index", "split", "step", "samples", "time", "lr", "samples_per_second", "data_wait"}
"""Of a row of metrics.jsonl: what says nothing about the model."""


def heldout_figures(run: Path, phase_index: int) -> dict[str, Any]:
    """The last held-out row of a phase; empty where nothing was held out. Lists have an element per codebook.

    `codebook_ecu` is added: ECU (Eq. 31) of the usage (CUR, Eq. 29) and perplexity (e to the power of UE, Eq. 30).
    """
    read = read_run(run)
    rows = next((phase.heldout for phase in read.phases if phase.index == phase_index), [])
    found = {name: value for name, value in (rows[-1] if rows else {}).items() if name not in NOT_FIGURES}
    if "codebook_perplexity" in found:  # older runs have none
        size = math.log(read.recipe.model.quantizer.codebook_size)
        shares = zip(found["codebook_usage"], found["codebook_perplexity"], strict=True)
        found["codebook_ecu"] = [used * math.log(max(spread, 1.0)) / size for used, spread in shares]
    return found


def probe_figures(run: Path) -> dict[str, Any]:
    """What ``bridle probe --out RUN`` has left, as the card shows it; empty without one.

    `sha256` is of the weights that were probed; `scores`: feature to reader to a figure with its interval.
    """
    path = run / PROBE
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
        return {
            "sha256": found["model"]["sha256"],
            "about": f"{str(found['metric']).replace('_', ' ')} with 95 % intervals on {found['tested']} files of "
            f"{len(found['classes'])} classes ({', '.join(found['shards'])}, labels {found['labels']}); "
            f"guessing scores {found['chance']:.3f}",
            "scores": {name: _by_reader(scores, found["metric"]) for name, _, scores in score_rows(found)},
            "verdicts": verdicts(found),
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # a user's file, which must not end a run at its export
        log.warning("%s: not what `bridle probe` writes, so the model's card goes without it", path)
        return {}


def _by_reader(scores: list[Mapping[str, Any]], metric: str) -> dict[str, str]:
    return {score["reader"]: spelled(score[metric]) for score in scores}
