"""Which samples of a plan are held out: whole groups, and the same share of every label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bridle.data.errors import ShardError
from bridle.data.writer import Planned


def split(samples: Sequence[Planned], share: float) -> tuple[list[Planned], list[Planned]]:
    """Training and held-out samples, both in the plan's order.

    Samples of one group (clips of one recording, pictures of one series) stay together. Of each label's groups the
    first by a hash of their names are taken; what the share of a small label is short of a whole group is owed by the
    next label, so that the share is right over all. At least one group is taken.

    Args:
        share: above 0 and at most a half.

    Raises:
        ShardError: all samples are of one group.
    """
    groups: dict[str, list[Planned]] = {}
    for sample in samples:
        groups.setdefault(sample.group or f"sample {sample.key}", []).append(sample)
    if len(groups) < 2:
        raise ShardError(f"all {len(samples)} samples are of one group, so none can be held out; leave --heldout out")
    labels: dict[str, list[str]] = {}
    for group in sorted(groups, key=_digest):
        labels.setdefault(_label(groups[group][0]), []).append(group)
    taken: set[str] = set()
    owed = 0.0
    for label in sorted(labels):
        owed += share * sum(len(groups[group]) for group in labels[label])
        for group in labels[label]:
            if len(groups[group]) <= 2 * owed:
                owed -= len(groups[group])
                taken.add(group)
    taken = taken or {min(groups, key=_digest)}
    heldout = {sample.key for group in taken for sample in groups[group]}
    return [sample for sample in samples if sample.key not in heldout], [s for s in samples if s.key in heldout]


def _label(sample: Planned) -> str:
    labels = sample.meta.get("labels") or [sample.meta.get("label", "")]
    return str(labels[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
