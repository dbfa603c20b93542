"""The shards that we write are WebDataset's own, to its reader as well as to ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shard_inputs import Tree, build
from webdataset import WebDataset

from bridle.data.patterns import expand
from bridle.data.shards import open_shards


def read_by_webdataset(shard: str | Path) -> dict[str, dict[str, bytes]]:
    """Members of each key, in the shard's order."""
    found = {}
    for sample in WebDataset(str(shard), shardshuffle=False, empty_check=False):
        key = sample["__key__"]
        assert key not in found
        found[key] = {name: content for name, content in sample.items() if not name.startswith("__")}
    return found


def test_built_shards_read_the_same_in_webdataset(tree: Tree, tmp_path: Path) -> None:
    files = {f"dog/clip_{i}.wav": os.urandom(100 + i) for i in range(7)}
    files |= {"ü/ö.flac": b"umlauts", f"deep/{'a' * 90}/{'b' * 120}.wav": b"long", "v1.0_a.WAV": b"dots"}
    out = tmp_path / "out"
    assert build("folder", tree(files), out, "--samples-per-shard", "4") == 0
    shards = [path for path in sorted(out.glob("*.tar")) if len(read_by_webdataset(path)) <= 4]
    assert len(shards) == 3
    theirs = {key: members for shard in shards for key, members in read_by_webdataset(shard).items()}
    ours = open_shards([f"{out}/*.tar"], extensions=["wav", "flac"])
    assert len(ours) == len(files) and list(theirs) == [ours.where(i)[1] for i in range(len(ours))]
    for i in range(len(ours)):
        sample = ours.read(i)
        assert theirs[sample.key] == {sample.extension: sample.data, "json": sample.meta["json"]}
        source = json.loads(theirs[sample.key]["json"])["source"]
        assert files[source] == sample.data


@pytest.mark.parametrize("name", ["audio-train", "audio-heldout", "image-train", "image-heldout", "video-train"])
def test_the_shards_that_ship_read_the_same_in_webdataset(name: str) -> None:
    (shard,) = expand([f"builtin:{name.removesuffix('-train')}"])
    theirs = read_by_webdataset(shard)
    ours = open_shards([shard], extensions=[])
    assert len(ours) > 0
    assert {ours.where(i)[1]: ours.data(i) for i in range(len(ours))} == {
        key: next(content for extension, content in members.items() if extension != "json")
        for key, members in theirs.items()
    }
