"""The paper's comparison of quantizers: one codebook or residual ones, uniform or k-means starts, iterations 1 and 2.

Each arm is a recipe's run with another quantizer; each run leaves a model an iteration. What a model shows is measured
once and kept beside its run, so that a study that was stopped goes on from what is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridle.config import ColdStartPhase, Recipe
from bridle.errors import MistakeError
from bridle.evaluation.codebooks import CodebookUsage, code_usage_rate, effective_code_usage
from bridle.evaluation.linear_probe import ProbeSettings
from bridle.evaluation.probe import Labelled, Task, figures
from bridle.evaluation.probe_features import Comparison, Feature
from bridle.evaluation.probe_scores import READERS
from bridle.files import whole_file

ARMS = {"vq": "(VQ)", "rq-uniform": "(uniform)", "rq-kmeans": "(k-means)"}
"""Arms of vq-vs-rq, and what the paper's tables call them."""
METHODS = {"vq": "VQ", "rq-uniform": "RQ (uniform)", "rq-kmeans": "RQ (k-means)"}
"""The same in its Table 6."""
EMBEDDINGS = "encoder (mean+std)"
RANDOM = "random weights (mean+std)"
"""The feature of the linear probe and its control, as `probe_features` calls them."""


def arm_settings(recipe: Recipe, arm: str, seed: int, share: float) -> list[str]:
    """Overrides of a recipe that make it an arm's run.

    VQ has one codebook with as many codes as the recipe's codebooks have together (Table 5: 1 x 1024 beside 4 x 256).
    share: of the length of each phase and of its warm-up.
    """
    quantizer = recipe.model.quantizer
    found = [f"seed={seed}", f"model.quantizer.init={'uniform' if arm == 'rq-uniform' else 'kmeans'}"]
    if arm == "vq":
        codes = quantizer.codebooks * quantizer.codebook_size
        found += ["model.quantizer.codebooks=1", f"model.quantizer.codebook_size={codes}"]
    for index, phase in enumerate(recipe.phases):
        if isinstance(phase, ColdStartPhase) or share == 1:
            continue
        for name in ("steps", "warmup_steps"):
            if (length := getattr(phase, name)) is not None:
                found.append(f"phases.{index}.{name}={max(1, round(length * share))}")
        for name in ("epochs", "warmup_epochs"):
            if (length := getattr(phase, name)) is not None:
                found.append(f"phases.{index}.{name}={length * share}")
    return found


@dataclass(frozen=True)
class Measured:
    """What a model shows of labelled files and of all files.

    embeddings: float32 ``[n, 2 width]``, mean and deviation over each file's content; counts: int64 ``[M, K]``, how
    often each code occurs; norms: float32 ``[M, K]``; files: int64 ``[n]``, numbers of the files in their shards.
    """

    embeddings: Tensor
    counts: Tensor
    norms: Tensor
    files: Tensor

    @classmethod
    def of(cls, features: Sequence[Feature], files: Sequence[int], usage: CodebookUsage, norms: Tensor) -> Measured:
        """features: of `pooled`; usage: of `measure`."""
        (embeddings,) = next(feature.copies for feature in features if feature.name == EMBEDDINGS)
        return cls(embeddings, usage.counts, norms, torch.tensor(files))

    def save(self, path: Path) -> None:
        """One file, whole or not at all."""
        with whole_file(path) as aside:
            save_file({name: value.contiguous() for name, value in vars(self).items()}, aside)

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Of `save`."""
        return cls(**load_file(path))


def probe_rows(
    measured: Mapping[tuple[str, int], Sequence[Measured]],
    controls: Sequence[Feature],
    task: Task,
    seed: int,
    paper: ProbeSettings,
) -> dict[str, Any]:
    """Scores of each arm and iteration over its seeds, beside random weights, as `bridle.evaluation.probe.figures`.

    measured: by arm and iteration, one a seed. controls: of `pooled`. Compared are iteration 2 with 1, RQ with VQ, the
    two starts, and all with random weights.
    """
    features = [Feature(row_name(*key), [each.embeddings for each in copies]) for key, copies in measured.items()]
    random = next(feature for feature in controls if feature.name == RANDOM)
    pairs: list[tuple[tuple[str, int], tuple[str, int]]] = []
    for iteration in (1, 2):
        pairs += [(("rq-kmeans", iteration), (other, iteration)) for other in ("vq", "rq-uniform")]
    pairs += [((arm, 2), (arm, 1)) for arm in ARMS]
    told = READERS[:1]
    compared = [Comparison(row_name(*a), row_name(*b), told) for a, b in pairs if a in measured and b in measured]
    compared += [Comparison(row_name(*key), RANDOM, told) for key in measured]
    return figures([*features, random], compared, task, seed, paper)


def row_name(arm: str, iteration: int) -> str:
    """As the paper's Tables 2 to 4 name a row."""
    return f"{ARMS[arm]} BRIDLE iter{iteration}"


def usage_rows(measured: Mapping[tuple[str, int], Sequence[Measured]]) -> list[dict[str, Any]]:
    """Table 6: CUR (Eq. 29) and ECU (Eq. 31) of each codebook; mean, least and greatest over the seeds."""
    rows = []
    for (arm, iteration), copies in sorted(
        measured.items(), key=lambda item: (item[0][1], list(ARMS).index(item[0][0]))
    ):
        for stage in range(len(copies[0].counts)):
            row: dict[str, Any] = {"iteration": iteration, "method": METHODS[arm]}
            row["codebook"] = None if arm == "vq" else stage + 1
            for name, metric in (("cur", code_usage_rate), ("ecu", effective_code_usage)):
                found = [float(metric(each.counts[stage])) for each in copies]
                row[name] = {"value": sum(found) / len(found), "least": min(found), "greatest": max(found)}
            rows.append(row)
    return rows


def same_files(measured: Iterable[Measured]) -> Tensor:
    """Numbers of the files that all have, which they must have in common.

    Raises:
        ValueError: they differ: the shards have changed since some were measured.
    """
    first, *others = [each.files for each in measured]
    if any(not torch.equal(first, other) for other in others):
        raise MistakeError("models were measured on different files: the shards have changed; begin in another --out")
    return first


def labelled_files(
    files: Sequence[int], lists: Sequence[Sequence[Labelled]], counts: Sequence[int]
) -> list[list[Labelled]]:
    """Those of some lists of labelled files that were measured, list by list; the numbers of a list begin behind the
    `counts` files of the sets before it.

    Raises:
        MistakeError: not all that were measured are there: other files have labels now.
    """
    measured, before = set(files), 0
    kept: list[list[Labelled]] = []
    for some, count in zip(lists, counts, strict=True):
        kept.append([file for file in some if before + file.number in measured])
        before += count
    if sum(map(len, kept)) != len(measured):
        raise MistakeError(
            f"models were measured on {len(measured)} files, and {sum(map(len, kept))} of them have a label now:"
            " --labels or --test was another; begin in another --out"
        )
    return kept
