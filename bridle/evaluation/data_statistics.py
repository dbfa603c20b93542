"""What a data set is like: mean and deviation of its values, durations, kinds and rates. One file beside each index."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridle.data.errors import ShardError
from bridle.data.fingerprint import same, shard_print
from bridle.data.index import SUFFIX as INDEX
from bridle.data.shards import Shard, ShardSet
from bridle.errors import MistakeError
from bridle.files import read_json, whole_file
from bridle.modalities.clip import ClipError, Modality

SUFFIX = ".stats"
FORMAT = 2


@dataclass
class Statistics:
    """Of one shard, or of several added up.

    count: values of each channel; sums, squares: of the values of each channel and of their squares, before
    normalisation, padding left out; seconds: duration of each sample, empty without time; kinds: samples by their
    extension; rates: samples by what their header says of rate or size; skipped: samples that cannot be decoded.
    """

    modality: str
    features: dict[str, Any]
    """Settings of the clip that the values depend on."""
    samples: int = 0
    skipped: int = 0
    count: float = 0.0
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    rates: dict[str, int] = field(default_factory=dict)
    shard: dict[str, Any] = field(default_factory=dict)
    """Print of the one shard (`shard_print`): a shard that was built again has other figures."""
    format: int = FORMAT

    @property
    def mean(self) -> list[float]:
        """Of each channel."""
        return [total / self.count for total in self.sums]

    @property
    def std(self) -> list[float]:
        """Of each channel."""
        pairs = zip(self.squares, self.mean, strict=True)
        return [float(max(square / self.count - mean**2, 0.0) ** 0.5) for square, mean in pairs]

    def padding(self, clip_seconds: float) -> float | None:
        """Share of padding in clips of this length, one a sample; none without time."""
        if not self.seconds:
            return None
        return sum(1 - min(found, clip_seconds) / clip_seconds for found in self.seconds) / len(self.seconds)

    def add(self, other: Statistics, weight: float = 1.0) -> None:
        """Adds another's, its values counted `weight` times."""
        if other.count:
            self.sums = [a + weight * b for a, b in zip(self.sums or [0.0] * len(other.sums), other.sums, strict=True)]
            self.squares = [
                a + weight * b for a, b in zip(self.squares or [0.0] * len(other.squares), other.squares, strict=True)
            ]
        self.count += weight * other.count
        self.samples += other.samples
        self.skipped += other.skipped
        self.seconds += other.seconds
        self.kinds = dict(Counter(self.kinds) + Counter(other.kinds))
        self.rates = dict(Counter(self.rates) + Counter(other.rates))


def statistics_file(shard: Shard) -> Path:
    """Beside the shard's index."""
    return Path(str(shard.index_path).removesuffix(INDEX) + SUFFIX)


def measure(
    shards: ShardSet, modality: Modality, progress: Callable[[int], None], *, again: bool = False
) -> Statistics:
    """Statistics of all shards; each shard's are written beside its index, and read from there unless `again`.

    progress: told the number of samples after each.

    Raises:
        ValueError: no sample can be decoded.
    """
    whole, first = _empty(modality), 0
    for shard in shards.shards:
        found = None if again else _read(shard, modality)
        if found is None:
            found = _of_samples(shards, range(first, first + shard.count), modality, progress)
            found.shard = shard_print(shard)
            with whole_file(statistics_file(shard)) as aside:
                aside.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
        whole.add(found)
        first += shard.count
        progress(first)
    if not whole.count:
        raise MistakeError(f"none of {whole.skipped} samples can be decoded; run `bridle shards check` on them")
    return whole


def read(sets: Sequence[tuple[ShardSet, float]], modality: Modality) -> Statistics:
    """What `measure` wrote of several sets of shards, each with its weight.

    Raises:
        ValueError: a shard without statistics; says how to make them.
    """
    whole = _empty(modality)
    for shards, weight in sets:
        for shard in shards.shards:
            found = _read(shard, modality)
            if found is None:
                command = f"bridle shards stats {shard.url} --modality {modality.name}"
                raise MistakeError(f"{shard.url}: no statistics beside its index; run `{command}` on all of the shards")
            whole.add(found, weight)
    return whole


def _empty(modality: Modality) -> Statistics:
    return Statistics(modality.name, modality.features)


def _read(shard: Shard, modality: Modality) -> Statistics | None:
    """None where there are none, or such of another version, modality or feature, or of what was there before."""
    path = statistics_file(shard)
    if not path.is_file():
        return None
    try:
        found = Statistics(**read_json(path))
    except (ValueError, TypeError):
        return None
    wanted = (FORMAT, modality.name, modality.features)
    ours = (found.format, found.modality, found.features) == wanted and same(found.shard, shard_print(shard))
    return found if ours else None


def _of_samples(
    shards: ShardSet, numbers: Iterable[int], modality: Modality, progress: Callable[[int], None]
) -> Statistics:
    found = _empty(modality)
    sums = torch.zeros(2, modality.channels, dtype=torch.float64)
    for number in numbers:
        try:
            sample = shards.read(number)
            seconds = 0.0
            for clip in modality.windows(sample.data):
                content = modality.content(clip).double()
                sums += torch.stack([content.sum(1), content.square().sum(1)])
                found.count += content.shape[1]
                seconds += clip.duration_s or 0.0
            rate = modality.rate(sample.data)
        except (ClipError, ShardError):
            found.skipped += 1
            continue
        found.samples += 1
        if modality.axes[0] == "time":
            found.seconds.append(round(seconds, 3))
        found.kinds[sample.extension] = found.kinds.get(sample.extension, 0) + 1
        if rate is not None:
            found.rates[rate] = found.rates.get(rate, 0) + 1
        progress(number + 1)
    found.sums, found.squares = sums.tolist()
    return found
