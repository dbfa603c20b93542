"""`bridle corpus`: figures that are right on a corpus whose figures are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus_inputs import sample_media, write_tar

from bridle.cli import main
from bridle.evaluation.corpus import entropy
from bridle.tokens.corpus import Corpus


@pytest.mark.parametrize("kind", ["parquet", "megatron"])
def test_the_report_of_a_corpus(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = sample_media("audio", 3)
    files = [(f"k{i}.{extension}", data) for i, (extension, data) in enumerate([*media, media[0]])]
    silent = io.BytesIO()
    soundfile.write(silent, np.zeros(32_000), 16_000, format="WAV")
    shard = write_tar(tmp_path / "s.tar", [*files, ("silent.wav", silent.getvalue())])
    out = tmp_path / "codes"
    command = ["tokenize", str(models["audio"]), str(shard), "--out", str(out), "--workers", "0", "--format", kind]
    assert main(command) == 0
    assert main(["corpus", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "5 clips" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "corpus.json").read_text())
    rows = list(Corpus(str(out)))
    codes = np.concatenate([row.codes for row in rows])
    assert (found["clips"], found["positions"], found["codes"]) == (5, len(codes), codes.size)
    assert found["hours"] * 3600 == pytest.approx(sum(row.duration_s or 0 for row in rows))
    for book, row in enumerate(found["codebooks"]):
        share = np.unique(codes[:, book], return_counts=True)[1] / len(codes)
        assert row["used"] == len(share)
        assert row["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum())
        assert row["entropy_bits_given_position"] <= row["entropy_bits"] + 1e-9
    assert found["bits_per_second"] == pytest.approx(
        sum(row["entropy_bits"] for row in found["codebooks"]) * len(codes) / (found["hours"] * 3600)
    )
    assert found["duplicates"] == [["k0", "k3"]]
    assert found["duplicate_clips"] == 1
    longest = found["longest_runs"][0]
    assert longest["key"] == "silent"
    grid = next(row.grid for row in rows if row.key == "silent")
    assert longest["steps"] > grid["time"] // 2
    commonest = found["commonest_ngrams"][0]
    lines = [row.codes[:, 0].reshape(row.grid["time"], -1).T for row in rows]
    windows = [np.lib.stride_tricks.sliding_window_view(line, 3, 1) for line in lines if line.shape[1] >= 3]
    times = sum((window == commonest["codes"]).all(-1).sum() for window in windows)
    assert commonest["times"] == times
    assert commonest["clips"]
    page = (tmp_path / "report" / "corpus.html").read_text()
    assert "silent" in page
    assert "<script" not in page


def test_entropy_given_the_position_is_that_of_each_position() -> None:
    uniform, certain = np.array([[5, 5], [8, 2]]), np.array([[10, 0], [0, 10]])
    np.testing.assert_allclose(entropy(uniform), [1.0, 0.721928], atol=1e-6)
    np.testing.assert_allclose(entropy(certain), [0.0, 0.0])
    np.testing.assert_allclose(entropy(np.zeros(3)), 0.0)
