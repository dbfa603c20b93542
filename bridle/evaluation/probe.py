"""Whether a model's features tell labels that it never saw, and more than controls do: `bridle probe`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridle.data.errors import ShardError
from bridle.data.shards import ShardSet
from bridle.errors import MistakeError
from bridle.evaluation.linear_probe import ProbeSettings, trained_scores
from bridle.evaluation.probe_features import Comparison, Feature
from bridle.evaluation.probe_scores import (
    READERS,
    accuracy,
    balanced_accuracy,
    draws,
    folds_of,
    mean_average_precision,
    read,
    top_accuracy,
)
from bridle.settings import RecipeError

DRAWS = 1000
"""Bootstrap draws behind an interval."""
LEVEL = (0.025, 0.975)
"""Quantiles of an interval."""
LEAST = 2
"""Groups (files, without groups) that a class needs among those learned from."""
LONGEST = 1 << 20
"""Bytes of a member that may be a label."""
WHERE = re.compile(r"(?P<member>[^.]+)(?:\.(?P<field>.+))?")
Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
SINGLE: dict[str, Metric] = {
    "balanced_accuracy": balanced_accuracy, "accuracy": accuracy, "top_5_accuracy": partial(top_accuracy, count=5)
}  # fmt: skip
SEVERAL: dict[str, Metric] = {"mean_average_precision": mean_average_precision}
"""Metrics where files have one label each, and where some have several; the first is the one of the claims."""


@dataclass(frozen=True)
class Labelled:
    """A file with labels: its number in the shards, its labels, none twice, and the group that it must stay with."""

    number: int
    labels: tuple[str, ...]
    group: str


class _Only:
    """For `ShardSet.members`: everything but these."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name not in self.names


def read_labels(shards: ShardSet, labels: str, group: str | None) -> tuple[list[Labelled], int]:
    """The labelled files, and how many have no label.

    labels, group: a member's extension (each line of its text is a label; of `json` it is `labels` or `label`), or
    ``json.FIELD``. Without a group each file is one by itself.

    Raises:
        RecipeError: no file has such a member, or the member is what the model reads.
        ShardError: it is no label, or a labelled file has no group.
    """
    wanted = [_where(text, shards.extensions) for text in (labels, *([group] if group else []))]
    found: list[Labelled] = []
    seen: Counter[str] = Counter()
    for number in range(len(shards)):
        key, names, content = shards.members(number, besides=_Only(*(member for member, _ in wanted)))
        place = f"{shards.where(number)[0]}, key {key}"
        seen.update(names)
        told = [_texts(content.get(member), member, field, place) for member, field in wanted]
        if told[0] and group and not told[1]:
            raise ShardError(f"{place}: has labels but no group '{group}'; give each file one, or leave --group out")
        if told[0]:
            found.append(Labelled(number, tuple(dict.fromkeys(told[0])), "\n".join(told[1]) if group else place))
    if not found:
        inside = ", ".join(f"{name} ({count})" for name, count in seen.most_common(12))
        raise RecipeError(
            f"--labels {labels}: none of {len(shards)} files has a label there; their members are: {inside}"
        )
    return found, len(shards) - len(found)


def _where(text: str, extensions: Sequence[str]) -> tuple[str, str | None]:
    parts = WHERE.fullmatch(text.strip().lstrip("."))
    member, field = (parts["member"].lower(), parts["field"]) if parts else ("", None)
    if not member or (field and member != "json"):
        raise RecipeError(f"'{text}' names no member; give an extension such as cls, or json.FIELD")
    if member in extensions:
        raise RecipeError(f"'{text}' is what the model reads; give the extension of a member with labels, such as cls")
    return member, field


def _texts(content: bytes | None, member: str, field: str | None, place: str) -> list[str]:
    """Labels in a member; none where it is missing or empty."""
    if content is None:
        return []
    if len(content) > LONGEST:
        raise ShardError(f"{place}: .{member} has {len(content)} bytes, which is no label")
    try:
        text = content.decode()
        if member != "json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        fields = json.loads(text)
    except ValueError:
        kind = "JSON" if member == "json" else "text (UTF-8)"
        raise ShardError(f"{place}: .{member} is not {kind}, so it holds no label") from None
    if not isinstance(fields, dict):
        raise ShardError(f"{place}: .json is not a JSON object; build the shard again")
    value = fields.get(field) if field else fields.get("labels", fields.get("label"))
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if each is not None and str(each) != ""]


@dataclass(frozen=True)
class Task:
    """What the readers are asked.

    classes: names, sorted. targets: bool ``[n, C]``. groups: of each file. splits: indices of files to learn from and
    to test; each file is tested at most once. kept: the files' places in the lists that the task was made of.
    """

    classes: list[str]
    targets: Tensor
    groups: list[str]
    splits: list[tuple[Tensor, Tensor]]
    kept: Tensor
    left_out: dict[str, int]
    """Files of the classes that are too rare to be learned."""
    several: bool
    """Whether a file may have several labels."""

    @property
    def tested(self) -> Tensor:
        """Files that a split tests, in order."""
        return torch.cat([test for _, test in self.splits]).sort().values


def make_task(learn: Sequence[Labelled], test: Sequence[Labelled] | None, folds: int, seed: int) -> Task:
    """The task of files that are learned from and tested in turn, or of two lists of files, the first to learn from.

    Classes of fewer than two groups to learn from are left out, and files that have no other label with them.

    Raises:
        RecipeError: fewer than two classes remain, to learn or to test; a group that is in both lists; too many folds.
    """
    files = [*learn, *(test or [])]
    if test is not None and (both := {file.group for file in learn} & {file.group for file in test}):
        raise RecipeError(f"group '{min(both)}' is in the shards to learn from and in --test; keep them apart")
    owners: dict[str, set[str]] = {}
    for file in learn:
        for label in file.labels:
            owners.setdefault(label, set()).add(file.group)
    classes = sorted(label for label, groups in owners.items() if len(groups) >= LEAST)
    counts = Counter(label for file in files for label in file.labels)
    if len(classes) < 2:
        told = ", ".join(f"{label} ({count})" for label, count in counts.most_common(5))
        raise RecipeError(f"labels: found {told}; a probe needs two classes or more, each in {LEAST} groups or files")
    place = {label: column for column, label in enumerate(classes)}
    kept = [i for i, file in enumerate(files) if any(label in place for label in file.labels)]
    targets = torch.zeros(len(kept), len(classes), dtype=torch.bool)
    for row, i in enumerate(kept):
        targets[row, [place[label] for label in files[i].labels if label in place]] = True
    groups = [files[i].group for i in kept]
    if test is None:
        try:
            fold = folds_of(groups, targets, folds, seed)
        except MistakeError as error:
            raise RecipeError(f"--folds {folds}: {error}") from None
        splits = [(torch.where(fold != i)[0], torch.where(fold == i)[0]) for i in range(folds)]
    else:
        known = torch.tensor([i < len(learn) for i in kept])
        splits = [(torch.where(known)[0], torch.where(~known)[0])]
        if int((targets[~known].sum(0) > 0).sum()) < 2:
            raise RecipeError("--test: its files have fewer than two of the classes that were learned")
    left_out = {label: count for label, count in counts.items() if label not in place}
    several = any(len(file.labels) > 1 for file in files)
    return Task(classes, targets, groups, splits, torch.tensor(kept), left_out, several)


def figures(
    features: Sequence[Feature], compared: Sequence[Comparison], task: Task, seed: int, paper: ProbeSettings | None
) -> dict[str, Any]:
    """Scores of all features with intervals, and what each is above its control, as plain data.

    features: of the files that the task was made of. paper: settings of the paper's linear probe; none: without it.
    Intervals are of 95 %, over bootstrap draws of files (of groups,
    where there are any) that are the same for a feature and its control, so that a difference is of pairs; each draw
    takes one seed of a control, so that luck with weights is in the interval. Readers are not fitted anew in each draw.
    """
    metrics = SEVERAL if task.several else SINGLE
    readers = READERS if paper else READERS[:2]
    tested = task.tested
    targets, weights = task.targets[tested], draws([task.groups[i] for i in tested.tolist()], DRAWS, seed)
    drawn: dict[tuple[str, str, str], Tensor] = {}
    for feature in features:
        read_copies = _read(feature, task, seed, paper)
        for reader in readers:
            for name, metric in metrics.items():
                each = [metric(scores[reader][tested], targets, weights) for scores in read_copies]
                drawn[feature.name, reader, name] = _over_copies(torch.stack(each), seed)
    scores = [
        {
            "feature": feature.name,
            "reader": reader,
            "columns": feature.copies[0].shape[1],
            **{name: _interval(drawn[feature.name, reader, name]) for name in metrics},
        }
        for feature in features
        for reader in readers
    ]
    differences = [_compared(comparison, reader, drawn, list(metrics)) for comparison in compared for reader in readers]
    main = next(iter(metrics))
    share = targets.double().mean(0)
    chance = float(share.mean()) if task.several else 1 / int((share > 0).sum())
    return {
        "metric": main,
        "chance": chance,
        "paper": asdict(paper) if paper else None,
        "classes": {name: int(count) for name, count in zip(task.classes, task.targets.sum(0), strict=True)},
        "left_out": task.left_out,
        "files": len(task.kept),
        "tested": len(tested),
        "groups": len(set(task.groups)),
        "scores": scores,
        "comparisons": differences,
    }


def _read(feature: Feature, task: Task, seed: int, paper: ProbeSettings | None) -> list[dict[str, Tensor]]:
    """Scores of each copy by each reader."""
    copies = [copy[task.kept] for copy in feature.copies]
    found = [read(copy, feature.scaled, task.targets, task.splits) for copy in copies]
    if paper:
        trained = trained_scores(copies, feature.scaled, task.targets, task.splits, paper, seed)
        found = [scores | {READERS[2]: last} for scores, last in zip(found, trained, strict=True)]
    return found


def _over_copies(values: Tensor, seed: int) -> Tensor:
    """float64 ``[R, 1 + B]`` of R copies to ``[1 + B]``: their mean over all files, and one of them in each draw."""
    copies, count = values.shape
    picked = torch.from_numpy(np.random.default_rng([seed, copies]).integers(copies, size=count - 1))
    return torch.cat([values[:, :1].mean(0), values[picked, torch.arange(1, count)]])


def _compared(
    comparison: Comparison, reader: str, drawn: dict[tuple[str, str, str], Tensor], metrics: list[str]
) -> dict[str, Any]:
    feature, control = comparison.feature, comparison.control
    rows = {}
    for name in metrics:
        own, other = drawn[feature, reader, name], drawn[control, reader, name]
        rows[name] = {
            "feature": _interval(own), "control": _interval(other), "difference": _interval(own - other)
        }  # fmt: skip
    low, high = rows[metrics[0]]["difference"]["interval"]
    word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    row = {"feature": feature, "control": control, "reader": reader, "word": word, **rows}
    return row | {"told": reader in comparison.told}


def _interval(values: Tensor) -> dict[str, Any]:
    """values: float64 ``[1 + B]``, the first of all files."""
    return {"value": float(values[0]), "interval": [float(edge) for edge in np.quantile(values[1:].numpy(), LEVEL)]}


def verdicts(found: dict[str, Any]) -> list[str]:
    """A line a claim, of `figures`."""
    metric = found["metric"]
    lines = []
    for row in found["comparisons"]:
        if row["told"]:
            own, other, difference = (row[metric][key] for key in ("feature", "control", "difference"))
            low, high = difference["interval"]
            lines.append(
                f"{row['feature']} {row['word']} {row['control']}{_by(row)}: {metric.replace('_', ' ')} {spelled(own)}"
                f" against {other['value']:.3f}; difference {difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    return lines


def _by(row: dict[str, Any]) -> str:
    return "" if row["reader"] == READERS[0] else f", by the {row['reader']}'s probe"


def spelled(figure: dict[str, Any]) -> str:
    """A figure and its interval."""
    low, high = figure["interval"]
    return f"{figure['value']:.3f} [{low:.3f}, {high:.3f}]"
