"""The paper's linear probe against a plain loop, and the encoder's regions against embeddings averaged by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import tone, write_tar

import bridle
from bridle.data.shards import open_shards
from bridle.evaluation import linear_probe
from bridle.evaluation.codebooks import Windows
from bridle.evaluation.linear_probe import ProbeSettings, learning_rate, paper_settings, trained_scores
from bridle.evaluation.probe_features import NumberedWindows, pooled, regions_of


def test_settings_are_those_of_table_5() -> None:
    assert linear_probe.WEIGHT_DECAY == 1e-4
    assert paper_settings("audio", 20_000) == ProbeSettings(lr=4e-2, epochs=400, batch=256)
    assert paper_settings("audio", 1_900_000) == ProbeSettings(lr=4e-3, epochs=250, batch=256)
    assert paper_settings("image", 1_281_167) == ProbeSettings(lr=2e-3, epochs=300, batch=1024)
    assert paper_settings("video", 240_000) == paper_settings("image", 240_000)


def test_the_rate_climbs_for_a_ninth_of_the_steps_and_falls_to_nothing_without_a_jump() -> None:
    rates = np.array([learning_rate(step, 90, 1.0) for step in range(90)])
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates.max() == 1.0
    assert (np.diff(rates[9:]) < 0).all() and rates[-1] < 1e-3
    assert np.abs(np.diff(rates)).max() <= 0.1 + 1e-9


@pytest.mark.parametrize("batch", [64, 8], ids=["all files at once", "batches that each epoch shuffles anew"])
def test_it_is_a_plain_loop_of_adamw_over_standardised_features(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(linear_probe, "WEIGHT_DECAY", 0.1)  # as much as shows in so few steps
    rng = torch.Generator().manual_seed(0)
    x, labels = 3 + 2 * torch.randn(40, 6, generator=rng), torch.randint(3, (40,), generator=rng)
    learn, test = torch.arange(30), torch.arange(30, 40)
    targets, settings = torch.nn.functional.one_hot(labels, 3).bool(), ProbeSettings(0.05, 15, batch)
    (found,) = trained_scores([x], True, targets, [(learn, test)], settings, seed=4)
    assert not found[learn].any()

    known = (x - x[learn].mean(0)) / x[learn].std(0, correction=0)
    layer, draws = torch.nn.Linear(6, 3), torch.Generator().manual_seed(4)
    first = torch.nn.init.trunc_normal_(torch.empty(6, 3), std=0.01, generator=draws)
    layer.weight.data.copy_(first.T)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    taken: list[torch.Tensor] = []
    for _ in range(15):
        order = torch.randperm(30, generator=draws) if batch < 30 else learn
        taken += order.split(batch)
    for step, rows in enumerate(taken):
        loss = torch.nn.BCEWithLogitsLoss()(layer(known[rows]), targets[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(taken), 0.05)
        optimizer.step()
    torch.testing.assert_close(found[test].float(), layer(known[test]).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [16, 1024], ids=["batches of 16", "all at once"])
def test_copies_read_at_once_score_as_each_by_itself_and_planted_classes_are_found(batch: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 25)
    copies = [torch.from_numpy(np.eye(4)[labels] @ rng.normal(size=(4, 12)) + 0.5 * rng.normal(size=(100, 12)))
              for _ in range(3)]  # fmt: skip
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), 4).bool()
    splits = [(torch.arange(50), torch.arange(50, 100)), (torch.arange(50, 100), torch.arange(50))]
    settings = ProbeSettings(4e-2, 30, batch)
    together = trained_scores(copies, True, targets, splits, settings, seed=0)
    for copy, scores in zip(copies, together, strict=True):
        (alone,) = trained_scores([copy], True, targets, splits, settings, seed=0)
        torch.testing.assert_close(alone, scores, rtol=1e-3, atol=1e-3)
        assert (scores.argmax(1).numpy() == labels).mean() > 0.8


def test_regions_are_blocks_of_a_coarse_grid_over_the_content() -> None:
    region, count = regions_of({"time": 8, "frequency": 8}, 24)  # three steps of content
    assert count == 8 and region.reshape(3, 8).tolist() == [
        [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7]
    ]  # fmt: skip
    region, count = regions_of({"height": 4, "width": 4}, 16)
    assert count == 4 and region.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    region, count = regions_of({"time": 4, "height": 2, "width": 2}, 16)
    assert count == 8 and region.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert regions_of({"time": 1, "frequency": 1}, 1)[1] == 1


def test_a_files_regions_are_means_of_its_embeddings_there_padding_left_out(model_folder: Path, tmp_path: Path) -> None:
    model = bridle.load(model_folder)
    shard = write_tar(tmp_path / "two.tar", {"long.wav": tone(1.5), "short.wav": tone(0.1)})
    windows = Windows(open_shards([str(shard)], extensions=model.modality.extensions), model.modality)
    found = {
        feature.name: feature.copies[0] for feature in pooled(model, [], NumberedWindows(windows, [0, 1])).features
    }
    width, bands = model.config.encoder.width, model.modality.grid["frequency"]
    regions = found["encoder (regions)"].reshape(2, 2, 4, width)
    sums, held = torch.zeros(2, 4, width), torch.zeros(2, 4, 1)
    for clip in model.modality.windows(tone(1.5)):
        embeddings = model.embed(clip.values[None], [clip.positions])[0, : clip.positions].reshape(-1, bands, width)
        for step, row in enumerate(embeddings):
            half = int(step >= -(-len(embeddings) // 2))
            for band, value in enumerate(row):
                sums[half, band * 4 // bands] += value
                held[half, band * 4 // bands] += 1
    torch.testing.assert_close(regions[0], sums / held, rtol=1e-4, atol=1e-5)
    (clip,) = model.modality.windows(tone(0.1))
    assert clip.positions == bands, "one step in time: its second half is empty"
    short = model.embed(clip.values[None], [bands])[0, :bands].reshape(4, -1, width).mean(1)
    torch.testing.assert_close(regions[1, 0], short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(regions[1, 1], short.mean(0).expand(4, width), rtol=1e-4, atol=1e-5)
