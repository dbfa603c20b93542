"""The sample that ships: small, labelled, licensed, and the same bytes as its indexes say."""

from __future__ import annotations

import csv
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from bridle.data.check import check_shard
from bridle.data.patterns import expand
from bridle.data.shards import Sample, open_shards

FOLDER = Path(str(resources.files("bridle") / "data" / "sample"))


def read_all(name: str) -> list[Sample]:
    shards = open_shards([f"builtin:{name}"], extensions=[])
    return [shards.read(i) for i in range(len(shards))]


def test_sample_is_under_8_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


@pytest.mark.parametrize("modality", ["audio", "image", "video"])
def test_every_label_is_trained_on_and_held_out(modality: str) -> None:
    train, heldout = read_all(modality), read_all(f"{modality}-heldout")
    labels = Counter(sample.labels[0] for sample in train), Counter(sample.labels[0] for sample in heldout)
    assert labels[0].keys() == labels[1].keys() and len(labels[0]) >= 9
    assert not {sample.key for sample in train} & {sample.key for sample in heldout}
    assert 0.1 < len(heldout) / len(train + heldout) < 0.2


@pytest.mark.parametrize("modality", ["audio", "image", "video"])
def test_shipped_shards_are_whole(modality: str) -> None:
    for url in expand([f"builtin:{modality}", f"builtin:{modality}-heldout"]):
        assert check_shard(url, extensions=[], decode=None).faults == []


def test_every_shipped_sample_has_its_licence_and_no_other() -> None:
    with (FOLDER / "LICENSES.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert {row["licence"] for row in rows} <= {"CC0", "CC0-1.0", "public domain"}
    assert all(row["author"] and (row["source"] or "rendered from" in row["author"]) for row in rows)
    shipped = {
        f"{Path(sample.shard).name}/{sample.key}.{sample.extension}"
        for modality in ("audio", "image", "video")
        for name in (modality, f"{modality}-heldout")
        for sample in read_all(name)
    }
    assert {row["file"] for row in rows} == shipped
