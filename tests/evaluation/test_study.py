"""`bridle study vq-vs-rq`: its arms are the paper's, and it goes through the door, stops and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_inputs import RECIPE

from bridle.cli import main
from bridle.config import load_recipe
from bridle.errors import MistakeError
from bridle.evaluation.probe import Labelled
from bridle.evaluation.study import ARMS, arm_settings, labelled_files


def test_arms_are_those_of_the_paper() -> None:
    recipe = load_recipe("audio")
    found = {arm: load_recipe("audio", arm_settings(recipe, arm, 2, 0.5)) for arm in ARMS}
    shapes = {
        arm: (each.model.quantizer.codebooks, each.model.quantizer.codebook_size, each.model.quantizer.init)
        for arm, each in found.items()
    }
    assert shapes == {"vq": (1, 1024, "kmeans"), "rq-uniform": (4, 256, "uniform"), "rq-kmeans": (4, 256, "kmeans")}
    for each in found.values():
        assert each.seed == 2
        for half, whole in zip(each.phases[1:], recipe.phases[1:], strict=True):
            assert half.epochs == whole.epochs / 2 and half.warmup_epochs == whole.warmup_epochs / 2
    mini = load_recipe("image-mini")
    assert [phase.steps for phase in load_recipe("image-mini", arm_settings(mini, "vq", 0, 0.1)).phases[1:]] == [
        round(phase.steps * 0.1) for phase in mini.phases[1:]
    ]


@pytest.mark.slow  # three runs are what a study is
def test_a_study_trains_measures_and_goes_on_from_what_is_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "study"
    command = ["study", "vq-vs-rq", "builtin:audio", "--recipe", str(recipe), "--seeds", "1", "--out", str(out)]
    assert main([*command, "--labels", "txt"]) == 2
    assert "none of 105 files has a label there" in capfd.readouterr().err
    assert main(command) == 0
    found = json.loads((out / "study.json").read_text())
    names = [score["feature"] for score in found["probe"]["scores"] if score["reader"] == "linear"]
    assert len(names) == 7 and names[0] == "(VQ) BRIDLE iter1" and names[-1].startswith("random weights")
    assert [row["codebook"] for row in found["usage"]] == 2 * [None, 1, 2, 3, 4, 1, 2, 3, 4]
    assert all(0 < row[name]["value"] <= 1 for row in found["usage"] for name in ("cur", "ecu"))
    page = (out / "study.html").read_text()
    assert page.count("data:image/png") == 6 and "codebook_size: 64" in page
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "rq-kmeans-0" / "measured-2.safetensors").unlink()
    capfd.readouterr()
    assert main(command) == 0
    assert json.loads((out / "study.json").read_text())["probe"] == found["probe"]
    changed = {path for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert changed == {out / "rq-kmeans-0" / "measured-2.safetensors"}
    assert "(k-means) BRIDLE iter2" in capfd.readouterr().out
    assert main([*command, "--share", "1"]) == 2  # and not the same figures under another name
    assert "was begun with another recipe (phases.1.steps: 1 there, 3 now" in capfd.readouterr().err


def test_files_that_were_measured_and_have_no_label_any_more_end_a_study() -> None:
    lists = [[Labelled(number, ("a",), str(number)) for number in some] for some in ((0, 2, 3), (1,))]
    kept = labelled_files([0, 3, 6], lists, [5, 2])
    assert [[file.number for file in files] for files in kept] == [[0, 3], [1]]
    with pytest.raises(MistakeError, match="measured on 4 files, and 3 of them have a label now"):
        labelled_files([0, 1, 3, 6], lists, [5, 2])
