"""Appendix D's metrics against numpy, and what measuring a data set says and leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import tone, write_tar
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

import bridle
from bridle.cli import main
from bridle.data.loaders import made_by_workers
from bridle.data.shards import open_shards
from bridle.evaluation.codebooks import (
    Windows,
    code_norms,
    code_usage_rate,
    dead_codes,
    effective_code_usage,
    measure,
    perplexity,
    usage_entropy,
)
from bridle.model_folder import stacked

COUNTS = arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 40)), elements=st.integers(0, 10_000))


@given(COUNTS)
def test_codebook_metrics_equal_equations_29_to_31_in_numpy(counts: np.ndarray) -> None:
    given_counts = torch.from_numpy(counts)
    for stage, row in enumerate(counts):
        used = row[row > 0]
        probabilities = used / used.sum() if len(used) else used
        cur = len(used) / len(row)
        ue = -sum(p * math.log(p) for p in probabilities)
        assert code_usage_rate(given_counts)[stage].item() == pytest.approx(cur)
        assert usage_entropy(given_counts)[stage].item() == pytest.approx(ue, abs=1e-12)
        assert effective_code_usage(given_counts)[stage].item() == pytest.approx(
            cur * ue / math.log(len(row)), abs=1e-12
        )
        assert perplexity(given_counts)[stage].item() == pytest.approx(math.exp(ue))
        assert dead_codes(given_counts)[stage].item() == len(row) - len(used)


@given(COUNTS, st.integers(2, 50))
def test_metrics_depend_on_shares_and_not_on_the_size_of_the_data(counts: np.ndarray, times: int) -> None:
    once, often = torch.from_numpy(counts), torch.from_numpy(counts * times)
    torch.testing.assert_close(effective_code_usage(often), effective_code_usage(once))
    assert (effective_code_usage(once) <= code_usage_rate(once) + 1e-12).all()


@pytest.mark.parametrize("size", [2, 256, 1024])
def test_codes_used_equally_often_have_ecu_1_and_a_single_code_0(size: int) -> None:
    even, single = torch.full((size,), 7), torch.zeros(size, dtype=torch.int64)
    single[1] = 100
    assert effective_code_usage(even).item() == pytest.approx(1.0)
    assert perplexity(even).item() == pytest.approx(size)
    assert effective_code_usage(single).item() == 0.0
    assert perplexity(single).item() == pytest.approx(1.0)
    assert dead_codes(single).item() == size - 1


def test_ecu_follows_equation_31_and_not_table_6() -> None:
    """Table 6 prints CUR / (UE in bits * ln K): .0283 where Eq. 31 gives .78, .0228 where it gives .99."""
    for printed, cur, by_equation in ((0.0283, 0.99, 0.78), (0.0228, 1.00, 0.99)):
        counts = _counts_with(entropy=cur / (printed * math.log(256)) * math.log(2), used=round(cur * 256), size=256)
        in_bits = usage_entropy(counts).item() / math.log(2)
        as_printed = code_usage_rate(counts).item() / (in_bits * math.log(256))
        assert as_printed == pytest.approx(printed, rel=0.01)
        assert effective_code_usage(counts).item() == pytest.approx(by_equation, abs=0.01)


def _counts_with(entropy: float, used: int, size: int) -> torch.Tensor:
    """Geometric counts over `used` of `size` codes, their ratio found by bisection so that UE is `entropy` nats."""
    low, high = 1e-6, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        weights = ratio ** np.arange(used)
        shares = weights / weights.sum()
        low, high = (ratio, high) if -(shares * np.log(shares + 1e-300)).sum() < entropy else (low, ratio)
    counts = np.zeros(size, dtype=np.int64)
    counts[:used] = np.maximum(1, np.round(shares * 1e12))
    return torch.from_numpy(counts)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Three sounds of 2.5, 1 and 0.4 s, and one file that is none."""
    files = {"a.wav": tone(2.5), "b.wav": b"not a sound", "c.flac": tone(1.0, "FLAC"), "d.wav": tone(0.4)}
    return write_tar(tmp_path / "sounds-0000.tar", files)


@pytest.mark.parametrize("workers", [0, 2])
def test_measuring_counts_each_code_of_each_file_once(workers: int, shard: Path, model_folder: Path) -> None:
    model = bridle.load(model_folder)
    shards = open_shards([str(shard)], extensions=model.modality.extensions)
    usage = measure(model, made_by_workers(Windows(shards, model.modality), workers), batch_size=3)
    codes = torch.cat([model.tokenize(shards.read(i).data).codes for i in (0, 2, 3)])
    expected = torch.stack([torch.bincount(codes[:, m], minlength=64) for m in range(4)])
    assert torch.equal(usage.counts, expected)
    assert usage.positions == len(codes)
    assert usage.files == 3
    assert len(usage.skipped) == 1
    assert "sounds-0000.tar, key b: " in usage.skipped[0]


def test_error_of_a_stage_is_the_mean_square_of_what_it_leaves_over(shard: Path, model_folder: Path) -> None:
    model = bridle.load(model_folder)
    shards = open_shards([str(shard)], extensions=model.modality.extensions)
    usage = measure(model, Windows(shards, model.modality))
    books = model.tokenizer.quantizer.codebooks.double().numpy()
    total, positions = np.zeros(4), 0
    for i in (0, 2, 3):
        for clip in model.modality.windows(shards.read(i).data):
            z = model.latents(*stacked([clip]))[0, : clip.positions].double().numpy()
            residual = z / np.linalg.norm(z, axis=1, keepdims=True)
            for m, book in enumerate(books):
                residual = residual - book[((residual[:, None] - book) ** 2).sum(-1).argmin(1)]
                total[m] += (residual**2).sum()
            positions += len(z)
    np.testing.assert_allclose(usage.error.numpy(), total / positions, rtol=1e-4)


def test_evaluating_codebooks_changes_nothing_in_the_model(shard: Path, model_folder: Path) -> None:
    model = bridle.load(model_folder)
    modules = {"encoder": model.encoder, "tokenizer": model.tokenizer}
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}
    measure(model, Windows(open_shards([str(shard)], extensions=["wav", "flac"]), model.modality))
    for name, module in modules.items():
        after = module.state_dict()
        assert after.keys() == before[name].keys()
        assert all(torch.equal(after[key], value) for key, value in before[name].items())
    assert model.tokenizer.quantizer.statistics.abs().sum() == 0


def test_codebooks_command_prints_a_table_and_writes_figures_and_picture(
    shard: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures"
    assert main(["codebooks", str(model_folder), str(shard), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("skipped") == 1
    found = json.loads((out / "codebooks.json").read_text())
    model = bridle.load(model_folder)
    assert found["model"]["sha256"] == model.sha256
    assert (found["files"], len(found["skipped"])) == (3, 1)
    table = captured.out.splitlines()
    for line, row, norms in zip(table[1:5], found["per_codebook"], code_norms(model), strict=True):
        assert line.split()[:4] == [str(row["codebook"]), *(f"{row[key]:.3f}" for key in ("cur", "ue", "ecu"))]
        assert sum(row["counts"]) == found["positions"]
        assert row["ecu"] == pytest.approx(effective_code_usage(torch.tensor(row["counts"])).item())
        assert sum(row["norm_counts"]) == 64
        assert row["norm_edges"][-1] == pytest.approx(norms.max().item())
    with Image.open(out / "code_norms.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000


def test_codebooks_command_says_when_nothing_can_be_decoded(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_tar(tmp_path / "broken.tar", {"a.wav": b"no", "b.wav": b""})
    assert main(["codebooks", str(model_folder), str(broken), "--out", str(tmp_path / "out")]) == 1
    assert "none of 2 files could be read" in capsys.readouterr().err
    assert main(["codebooks", str(model_folder), str(tmp_path / "none-*.tar")]) == 1
    assert "matches nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
