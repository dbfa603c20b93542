"""The stage for WebDataset pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from corpus_inputs import sample_media, write_tar

import bridle
from bridle.data.shards import open_shards
from bridle.modalities.clip import ClipError
from bridle.tokens import webdataset_stage


def test_a_webdataset_pipeline_gets_the_codes_of_single_files(models: dict[str, Path], sounds: list[Path]) -> None:
    model = bridle.load(models["audio"])
    urls = [str(path) for path in sounds]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).compose(webdataset_stage(model, batch=5))
    samples = list(pipeline)
    found = open_shards(urls, extensions=model.modality.extensions)
    assert [sample["__key__"] for sample in samples] == [found.read(i).key for i in range(len(found))]
    for i, sample in enumerate(samples):
        stream = model.tokenize(found.read(i).data)
        np.testing.assert_array_equal(sample["codes.npy"], stream.codes.T.numpy())
        assert sample["codes.json"] == {"grid": stream.grid, "duration_s": stream.duration_s}
        assert sample["txt"] == f"text of {i}".encode()
        assert not set(model.modality.extensions) & set(sample)


def test_a_sample_that_cannot_be_read_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    model = bridle.load(models["audio"])
    good = sample_media("audio", 1)[0][1]
    shard = write_tar(tmp_path / "s.tar", [("a.flac", good), ("b.flac", b"fLaC?"), ("c.flac", good)])
    said: list[Any] = []

    def dropped(sample: dict[str, Any], reason: str) -> bool:
        said.append((sample["__key__"], reason))
        return True

    dataset = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert [s["__key__"] for s in dataset.compose(webdataset_stage(model, on_error=dropped))] == ["a", "c"]
    assert [key for key, _ in said] == ["b"]
    with pytest.raises(ClipError, match="sample 'b'"):
        list(webdataset.WebDataset(str(shard), shardshuffle=False).compose(webdataset_stage(model)))
    with pytest.raises(ValueError, match="no member of"):
        list(webdataset_stage(model)([{"__key__": "k", "txt": b"words"}]))
