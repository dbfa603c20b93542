"""Packing keeps every id of every document, and rows are as full as best fit makes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.cli import main
from bridle.tokens.corpus import Corpus
from bridle.tokens.packing import pack

PAD = 10**6


@given(lengths=st.lists(st.integers(1, 40), max_size=30), length=st.integers(2, 16))
def test_every_id_comes_once_and_only_long_documents_are_cut(lengths: list[int], length: int) -> None:
    documents = [np.arange(size) + 1000 * number for number, size in enumerate(lengths)]
    packed = pack(documents, length, PAD)
    found = []
    for row, sizes in zip(packed.rows, packed.lengths, strict=True):
        assert len(row) == length
        assert (row[sum(sizes) :] == PAD).all()
        found += np.split(row[: sum(sizes)], np.cumsum(sizes)[:-1])
    found.sort(key=lambda piece: int(piece[0]))
    expected = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    assert len(found) == len(expected)
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    half_empty = sum(sum(sizes) * 2 <= length for sizes in packed.lengths)
    assert half_empty <= 1, "two half-empty rows would have been one"


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "megatron"])
def test_a_corpus_is_packed_and_read_by_datasets(
    kind: str, models: dict[str, Path], sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    codes, packed = str(tmp_path / "codes"), tmp_path / "packed"
    assert (
        main(["tokenize", str(models["audio"]), *map(str, sounds), "--out", codes, "--format", kind, "--workers", "0"])
        == 0
    )
    assert main(["pack", codes, "--length", "256", "--out", str(packed)]) == 0
    first = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (packed / "data").iterdir()}
    next((packed / "data").iterdir()).unlink()
    assert main(["pack", codes, "--length", "256", "--out", str(packed)]) == 0
    assert first == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (packed / "data").iterdir()}
    rows = list(datasets.load_dataset(str(packed), split="train", streaming=True))
    summary = json.loads((packed / "manifest.json").read_text())["summary"]
    corpus = Corpus(codes)
    ids = [row.ids for row in corpus if row.ids is not None]
    assert summary["tokens"] == sum(map(len, ids)) == sum(sum(row["lengths"]) for row in rows)
    assert len(rows) == summary["rows"]
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == 256
        used = sum(row["lengths"])
        assert row["labels"] == [*row["input_ids"][:used], *[-100] * (256 - used)]
        assert row["position_ids"][:used] == [place for size in row["lengths"] for place in range(size)]
    assert main(["pack", codes, "--length", "128", "--out", str(packed)]) == 1
    assert "something else" in capsys.readouterr().err
    assert main(["pack", str(packed), "--length", "128", "--out", str(tmp_path / "x")]) == 1
    assert "no manifest.json of bulk work" in capsys.readouterr().err


FLAT = [
    (kind, layout) for kind in ("parquet", "webdataset", "megatron", "jsonl") for layout in ("interleaved", "delay")
]


@pytest.mark.parametrize(("kind", "layout"), [*FLAT, *((k, "parallel") for k in ("parquet", "webdataset", "jsonl"))])
def test_every_format_is_read_back(
    kind: str, layout: str, models: dict[str, Path], sounds: list[Path], text_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes"
    template = [] if layout == "parallel" else ["--template", "{txt}: {codes}.", "--tokenizer", str(text_tokenizer)]
    more = ["--format", kind, "--layout", layout, "--workers", "0", *template]
    assert main(["tokenize", str(models["audio"]), str(sounds[1]), "--out", str(out), *more]) == 0
    plain = tmp_path / "plain"
    assert main(["tokenize", str(models["audio"]), str(sounds[1]), "--out", str(plain), "--workers", "0"]) == 0
    expected = {row.key: row for row in Corpus(str(plain))}
    found = {row.key: row for row in Corpus(str(out))}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        np.testing.assert_array_equal(row.codes, expected[key].codes)
        assert (row.grid, row.duration_s) == (expected[key].grid, expected[key].duration_s)
