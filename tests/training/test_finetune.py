"""Fine-tuning through its command: a classifier comes out, and a run that is killed ends like an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from halting import Halt
from launching import ROOT, command, environment, rows, variables_of, wait_for
from small_models import write_model
from warm import WarmProcess, run_warm

from bridle.classifier import load_classifier
from bridle.cli import main
from bridle.model_folder import load

SAMPLE = ROOT / "bridle" / "data" / "sample"
TINY = [
    "phases.0.steps=9", "phases.0.warmup_steps=2", "train.batch_size=8", "train.log_every=2",
    "train.checkpoint_every=3", "train.evaluate_clips=8", "train.prometheus_port=0", "data.workers=0",
]  # fmt: skip
"""Masks, mixup, drop path, smoothing, layer decay and weights stay as the recipe has them."""


def finetune_command(run: Path, model: Path, *more: str) -> list[str]:
    return command(
        run, "--recipe", "audio-mini", "--model", str(model), *more, *TINY, program="bridle/finetune.py", config="zero1"
    )


def finetune(run: Path, model: Path, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_warm(finetune_command(run, model, *more), env=environment(), cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finetune(run, model)
    return run


def test_a_run_killed_between_checkpoints_equals_an_undisturbed_one_to_the_last_digit(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    run, halt = tmp_path / "run", Halt("row 3", tmp_path / "halt")  # of step 6, whose checkpoint comes later
    with Path(f"{run}.log").open("w") as output:
        words, variables = halt.put_in(finetune_command(run, model), environment())
        process = WarmProcess(words, env=variables, cwd=ROOT, stdout=output, stderr=output)
    wait_for(lambda: halt.reached() and list(run.glob("checkpoints/*/step-00000003")), process, run)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=300) == -signal.SIGKILL
    told = finetune(run, model).stdout
    assert "from step 0" not in told
    assert rows(run) == rows(undisturbed)
    for file in ("classifier/model.safetensors", "classifier/heldout.json", "heldout_scores.npz"):
        assert (run / file).read_bytes() == (undisturbed / file).read_bytes(), file


def test_it_learns_from_the_models_encoder_and_leaves_a_classifier(undisturbed: Path, model: Path) -> None:
    classifier = load_classifier(undisturbed / "classifier")
    kinds = {"drum", "elec", "guitar", "language", "speech"}
    assert set(classifier.config.classes) & kinds and classifier.config.trained["start"] == "audio-test"
    pretrained = load(model).encoder.state_dict()
    tuned = classifier.module.encoder.state_dict()
    moved = {name: float((tuned[name] - pretrained[name]).abs().max()) for name in pretrained}
    assert max(moved.values()) > 0
    assert moved["embed.weight"] < 0.02 < float(pretrained["embed.weight"].abs().max())  # it did not begin elsewhere
    assert {path.name for path in (undisturbed / "classifier").iterdir()} == {
        "README.md", "config.json", "heldout.json", "model.safetensors"
    }  # fmt: skip


def test_bridle_classify_tells_what_the_run_scored(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(undisturbed / "heldout_scores.npz") as scored:
        files, classes, scores = scored["files"].tolist(), scored["classes"].tolist(), scored["scores"]
    with tarfile.open(SAMPLE / "audio-heldout-0000.tar") as tar:
        member = next(member for member in tar if member.name.endswith((".ogg", ".flac")))
        sound = tmp_path / Path(member.name).name
        sound.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    row = files.index(f"audio-heldout-0000.tar/{member.name.rpartition('.')[0]}")
    broken = tmp_path / "broken.ogg"
    broken.write_bytes(b"OggS, or not")
    folder = str(undisturbed / "classifier")
    assert main(["classify", folder, str(sound), str(broken), "--top", str(len(classes))]) == 1
    told = capsys.readouterr()
    (line,) = map(json.loads, told.out.splitlines())
    assert str(broken) in told.err and line["file"] == str(sound)
    found = {each["class"]: each["probability"] for each in line["classes"]}
    assert [found[name] for name in classes] == pytest.approx(scores[row].tolist(), abs=1e-4)
    values = [each["probability"] for each in line["classes"]]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=1e-4)


def test_a_classifier_that_is_missing_is_written_again_and_another_model_is_refused(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "classifier")
    other = write_model(tmp_path / "other", seed=1)
    assert "start.sha256" in finetune(run, other, code=2).stderr
    told = finetune(run, model).stdout
    assert "from step" not in told
    for file in ("model.safetensors", "heldout.json"):
        assert (run / "classifier" / file).read_bytes() == (undisturbed / "classifier" / file).read_bytes()


def test_two_ranks_learn_what_one_does_and_score_the_same_files(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    """What is drawn for a clip (mask, mixing, branches left out) is its own, however clips are shared out."""
    run = tmp_path / "run"
    given = ["--recipe", "audio-mini", "--model", str(model), *TINY]
    words = command(run, *given, program="bridle/finetune.py")
    done = run_warm(words, env=environment(), cwd=ROOT, ranks=variables_of(2))
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(rows(run), rows(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    ours, theirs = (np.load(each / "heldout_scores.npz") for each in (run, undisturbed))
    assert ours["files"].tolist() == theirs["files"].tolist()
    assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["phases.0.loss=hinge"], "loss"),
        (["phases.0.layer_decya=1"], "did you mean 'layer_decay'"),
        (["--recipe", "video-mini"], "a model for audio"),
        (["--labels", "cls"], "none of 105 files has a label there"),
        (["--fold", "3"], "labels but no group 'json.fold'"),
    ],
)
def test_mistakes_are_told_in_a_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    from bridle.finetune_recipe import load_finetune_recipe
    from bridle.settings import RecipeError

    if "=" in arguments[0]:
        with pytest.raises(RecipeError, match=told):
            load_finetune_recipe("audio-mini", arguments)
        return
    assert told in finetune(tmp_path / "run", model, *arguments, code=1 if "group" in told else 2).stderr


def test_a_model_is_no_classifier_and_a_classifier_no_model(
    undisturbed: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(model), "x.wav"]) == 1
    assert "bridle finetune" in capsys.readouterr().err
    assert main(["tokenize", str(undisturbed / "classifier"), "x.wav"]) == 1
    assert "bridle classify" in capsys.readouterr().err


def test_what_looks_at_runs_knows_a_fine_tuned_one(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(undisturbed)]) == 3
    assert "finished" in capsys.readouterr().out
    assert main(["export", str(undisturbed), str(undisturbed / "x")]) == 2
    assert f"{undisturbed}/classifier" in capsys.readouterr().err


def test_the_report_of_a_fine_tuned_run_is_a_page_of_its_figures(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((undisturbed / "classifier" / "heldout.json").read_text())["figures"]
    assert main(["report", str(undisturbed), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    for figure in found.values():
        low, high = figure["interval"]
        assert f"<td>{figure['value']:.3f} [{low:.3f}, {high:.3f}]</td>" in page
    with np.load(undisturbed / "heldout_scores.npz") as scored:
        right = (scored["scores"].argmax(1)[:, None] == np.arange(len(scored["classes"]))) & scored["targets"]
        for number, name in enumerate(scored["classes"].tolist()):
            own = int(scored["targets"][:, number].sum())
            share = f"{right[:, number].sum() / own:.3f}" if own else "–"
            assert f"<td>{name}</td><td>{own}</td><td>{share}</td>" in page
    assert "audio-test, sha256" in page and page.count("<svg") == 1
    assert f"accuracy {found['accuracy']['value']:.3f}" in capsys.readouterr().err

    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(undisturbed / "recipe.yaml", begun)
    (begun / "metrics.jsonl").write_text((undisturbed / "metrics.jsonl").read_text()[:-20])
    assert main(["report", str(begun)]) == 0
    told = capsys.readouterr().err
    assert "1 damaged lines" in told and "begun is not finished" in told and "no held-out figures yet" in told


def test_compare_pairs_runs_and_refuses_others(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(undisturbed), "--with", str(undisturbed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == 20 and found["metrics"]["accuracy"]["difference"] == [0.0, 0.0, 0.0]
    assert main(["compare", str(undisturbed), "--with", str(undisturbed.parent)]) == 2
