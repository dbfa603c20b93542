"""`bridle report`, on a run that the real training program made, finished and cut short."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import bridle
from bridle.cli import main
from bridle.data.shards import open_shards
from bridle.evaluation.palette import BLUE, DARK, ORANGE, RANGE, STEPS, code_colours
from bridle.evaluation.probe import Labelled, figures, make_task
from bridle.evaluation.probe_features import Comparison, Feature


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the finished run."""
    out = tmp_path_factory.mktemp("report") / "page.html"
    assert main(["report", str(tiny_run), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_page_needs_nothing_from_outside(finished: Page) -> None:
    assert not finished.all("script")
    assert not finished.all("link")
    for tag, attributes in finished.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            embedded = ("#", "data:image/png;base64,", "data:audio/mpeg;base64,")
            assert attributes.get(name, "#").startswith(embedded), (tag, name)
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    assert "http" not in finished.text


def test_page_tells_every_picture_in_words_too(finished: Page) -> None:
    pictures, drawings = finished.all("img"), finished.all("svg")
    assert len(pictures) == 3 * (2 + 4)
    assert len(drawings) == 9
    assert all(picture["alt"] for picture in pictures)
    assert all(drawing["aria-label"] and drawing["role"] == "img" for drawing in drawings)


def test_charts_show_the_rows_of_metrics(finished: Page, tiny_run: Path) -> None:
    told = {
        drawing["aria-label"].split(" over optimizer steps")[0]: drawing["aria-label"]
        for drawing in finished.all("svg")
    }
    assert set(told) == {
        "Loss", "Accuracy on hidden patches", "Cosine to the encoder", "Quantization error", "Codebook usage",
        "Learning rate", "Throughput", "Waiting for data", "Where a step's time goes",
    }  # fmt: skip
    last = {(row["phase_index"], row["split"]): row for row in _rows(tiny_run)}
    for index, kind in ((1, "encoder"), (2, "tokenizer"), (3, "encoder")):
        train, heldout = last[index, "train"], last[index, "heldout"]
        assert f"phase {index}: {kind}: training {train['loss']:.4g}, held out {heldout['loss']:.4g}" in told["Loss"]
        for m in range(4):
            usage = f"codebook {m + 1} {train['codebook_usage'][m]:.4g}, held out {heldout['codebook_usage'][m]:.4g}"
            assert usage in told["Codebook usage"]
    train, heldout = last[3, "train"], last[3, "heldout"]
    accuracy = f"codebook 4 {train['accuracy'][3]:.4g}, held out {heldout['accuracy'][3]:.4g}"
    baselines = f"most frequent code {train['codebook_majority'][3]:.4g}, chance {1 / 64:.4g}"
    assert accuracy in told["Accuracy on hidden patches"]
    assert baselines in told["Accuracy on hidden patches"]
    assert f"training {last[2, 'train']['cosine']:.4g}, held out" in told["Cosine to the encoder"]


def test_page_shows_the_newest_models_codes_of_heldout_clips(finished: Page, tiny_run: Path) -> None:
    model = bridle.load(tiny_run / "models" / "iteration-2")
    shards = open_shards(["builtin:audio-heldout"], extensions=model.modality.extensions)
    assert "Code maps from iteration-2" in finished.text
    maps = [picture for picture in finished.all("img") if picture["alt"].startswith("Code map, codebook 2")]
    shown = [_pixels(picture)[8::16, 8::16] for picture in maps]
    found = []
    for index in range(len(shards)):
        sample = shards.read(index)
        if ", ".join([sample.key, *sample.labels]) in finished.text:
            clip = next(iter(model.modality.windows(sample.data)))
            codes = model.codes(clip.values[None])[0, :, 1].numpy().reshape(*clip.grid.values())[: clip.valid]
            found.append(code_colours(codes).swapaxes(0, 1)[::-1])
    assert len(found) == len(shown) == 3
    for expected, pixels in zip(found, shown, strict=True):
        np.testing.assert_array_equal(pixels[:, : expected.shape[1]], expected)


def _pixels(picture: dict[str, str]) -> np.ndarray:
    data = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_page_begins_with_what_came_out_and_shows_clips_before_rates(finished: Page, tiny_run: Path) -> None:
    last = next(row for row in reversed(_rows(tiny_run)) if row["split"] == "heldout" and "accuracy" in row)
    share, majority = np.mean(last["accuracy"]), np.mean(last["codebook_majority"])
    assert f"held-out clips, {100 * share:.0f} % of the codes are predicted (always naming" in finished.text
    assert f"most frequent code: {100 * majority:.0f} %). Held-out clips use" in finished.text
    order = [
        "are predicted",
        "Held-out clips Each with a mask",
        "Phases",
        "Codebooks",
        "Loss",
        "Throughput",
        "What ran",
    ]
    places = [finished.text.index(words) for words in order]
    assert places == sorted(places)


def test_page_plays_the_sound_beside_its_spectrogram(finished: Page) -> None:
    players = finished.all("audio")
    assert len(players) == 3 and all(player["aria-label"] and "controls" in player for player in players)
    for player in players:
        sound, rate = soundfile.read(io.BytesIO(base64.b64decode(player["src"].partition(",")[2])))
        assert rate == 16_000 and 0.2 < len(sound) / rate < 1.3 and np.abs(sound).max() > 0.01


def test_page_has_usage_and_norms_of_each_codebook(finished: Page, tiny_run: Path, tmp_path: Path) -> None:
    model = str(tiny_run / "models" / "iteration-2")
    assert main(["codebooks", model, "builtin:audio-heldout", "--out", str(tmp_path)]) == 0
    for row in json.loads((tmp_path / "codebooks.json").read_text())["per_codebook"]:
        line = f"{row['codebook']} {row['cur']:.3f} {row['ecu']:.3f} {row['perplexity']:.1f} {row['dead']}"
        assert f"{line} {row['error']:.4f} {row['norm_mean']:.4f}" in finished.text


def test_the_playground_and_the_report_share_their_colours() -> None:
    script = (Path(bridle.__file__).parents[1] / "serving/web/playground/playground.js").read_text()
    assert f"const [DARK, RANGE, ORANGE, BLUE] = [{DARK}, {RANGE}, {ORANGE}, {BLUE}];" in script
    assert all(f"(code * {step}) % 1" in script for step in STEPS)
    # Lightness alone, which everybody sees, tells neighbouring codes apart.
    lightness = code_colours(np.arange(64)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert np.abs(np.diff(lightness)).min() > 40


def test_a_run_in_progress_has_a_page_with_what_there_is(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a <run> & more"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "models"))
    lines = [json.dumps(row) + "\n" for row in _rows(tiny_run) if row["phase_index"] == 1 and row["split"] == "train"]
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert main(["report", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(run / "report.html")
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "not finished: at step 2 of phase 1: encoder" in page.text
    assert "1 damaged lines" in page.text
    assert "no code maps" in page.text
    assert "a <run> & more" in page.text
    assert len(page.all("img")) == 3 * 2
    assert {drawing["aria-label"].split(" over ")[0] for drawing in page.all("svg")} == {
        "Loss", "Accuracy on hidden patches", "Codebook usage", "Learning rate", "Throughput", "Waiting for data",
        "Where a step's time goes",
    }  # fmt: skip
    assert captured.err.count("bridle report: ") == 2


def test_a_run_without_rows_or_heldout_clips_says_so(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = (tiny_run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("  heldout:\n  - builtin:audio-heldout\n", "  heldout: null\n"))
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "just begun" in page.text
    assert "No row of metrics has been written yet." in page.text
    assert "names no held-out clips" in page.text


def test_shards_that_are_gone_cost_the_clips_and_not_the_curves(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("builtin:audio-heldout", "/gone/*.tar"))
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "held-out clips cannot be shown" in page.text
    assert "/gone/*.tar" in page.text
    assert len(page.all("svg")) == 9


@pytest.mark.parametrize("recipe", [None, "a: [", "- 1", "modality: audio\nmodle: {}\n"])
def test_a_folder_that_is_no_run_ends_with_one_line_and_exit_code_2(
    recipe: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml" in error
    assert "Traceback" not in error
    assert not (tmp_path / "report.html").exists()


def test_page_tells_each_phases_health_and_verdict(finished: Page, tiny_run: Path) -> None:
    last = {(row["phase_index"], row["split"]): row for row in _rows(tiny_run)}
    for index, key in ((1, "position_accuracy"), (2, "r2_cold_start"), (3, "position_accuracy")):
        row = last[index, "heldout"]
        assert row["verdict"] in finished.text
        assert f"{np.mean(row[key]):.3f}" in finished.text
    assert "directions of latents" in finished.text


def test_page_shows_what_a_probe_of_the_run_has_found(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "models"))
    task = make_task([Labelled(i, ("dog" if i % 2 else "cat",), str(i)) for i in range(20)], None, 5, 0)
    told = torch.arange(20)[:, None] % 2 + torch.zeros(20, 3)
    features = [Feature("encoder (mean)", [told]), Feature("random weights (mean)", [torch.zeros(20, 3)])]
    found = figures(features, [Comparison(features[0].name, features[1].name, ("linear",))], task, 0, None)
    found |= {"model": {"sha256": "0123456789abcdef"}, "shards": ["s.tar"], "labels": "cls"}
    (run / "probe.json").write_text(json.dumps(found))
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "encoder (mean) above random weights (mean): balanced accuracy 1.000" in page.text
    assert "20 files of 2 classes (s.tar, labels cls)" in page.text and "0123456789ab" in page.text
