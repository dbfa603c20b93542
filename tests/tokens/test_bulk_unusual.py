"""Bulk work with inputs and settings that are unusual and allowed, or that a user got wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from corpus_inputs import sample_media, write_shards, write_tar
from test_bulk import READERS, bulk, expected_codes, manifest
from tokenizers import Tokenizer

from bridle.cli import main
from bridle.tokens.corpus import Corpus


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "jsonl", "megatron"])
def test_half_a_character_in_a_caption_costs_that_character(
    kind: str, models: dict[str, Path], text_tokenizer: Path, tmp_path: Path
) -> None:
    [(extension, data)] = sample_media("image", 1)
    about = rb'{"caption": "a dog \ud83d", "label": "dog\ud83d", "made": {"by": "\udfff"}}'
    shard = write_tar(tmp_path / "s.tar", [(f"a.{extension}", data), ("a.json", about)])
    out = tmp_path / "out"
    template = ["--template", "{caption} {label} {json.made.by}: {codes}", "--tokenizer", str(text_tokenizer)]
    assert bulk(models["image"], [shard], out, "--format", kind, *template) == 0
    [row] = Corpus(str(out))
    assert row.labels == ["dog\ufffd"]
    if kind == "jsonl":
        [line] = next((out / "data").glob("*.jsonl")).read_text().splitlines()
        assert json.loads(json.loads(line)["about"])["caption"] == "a dog \ufffd"
        assert json.loads(line)["text"].startswith("a dog \ufffd dog\ufffd \ufffd: <|image|>")


def test_codes_of_an_earlier_tokenizer_give_way(models: dict[str, Path], tmp_path: Path) -> None:
    [(extension, data)] = sample_media("image", 1)
    old = [(f"a.{name}", b"of another tokenizer") for name in ("codes.npy", "codes.json", "ids.npy")]
    shard = write_tar(tmp_path / "s.tar", [(f"a.{extension}", data), *old])
    assert bulk(models["image"], [shard], tmp_path / "out", "--format", "webdataset") == 0
    [row] = Corpus(str(tmp_path / "out"))
    np.testing.assert_array_equal(row.codes.T, expected_codes(models["image"], [shard], "image")["a"])


def test_a_file_whose_name_looks_like_a_pattern(models: dict[str, Path], tmp_path: Path) -> None:
    (first, data), (second, other) = sample_media("image", 2)
    names = [tmp_path / f"dog [1].{first}", tmp_path / f"cat.{second}"]
    names[0].write_bytes(data)
    names[1].write_bytes(other)
    assert bulk(models["image"], names, tmp_path / "out") == 0
    assert manifest(tmp_path / "out")["summary"]["samples"] == 2


def test_outputs_of_other_inputs_are_not_forgotten(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_shards(tmp_path / "in", "image", [1, 1])
    out = tmp_path / "out"
    assert bulk(models["image"], [one], out) == 0
    before = manifest(out)
    assert bulk(models["image"], [two], out) == 1
    assert "holds outputs of 1 inputs that are not given now, such as s0-" in capsys.readouterr().err
    assert manifest(out) == before
    assert bulk(models["image"], [one, two], out) == 0
    assert manifest(out)["summary"]["samples"] == 2
    assert bulk(models["image"], [two], tmp_path / "other") == 0
    packed = ["--length", "100", "--out", str(tmp_path / "packed")]
    assert main(["pack", str(out), *packed]) == 0
    before = manifest(tmp_path / "packed")
    assert main(["pack", str(tmp_path / "other"), *packed]) == 1
    assert "has not, such as s0-" in capsys.readouterr().err
    assert manifest(tmp_path / "packed") == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--offset", "3000000000"], "all formats hold ids of 32 bits"),
        (["--metrics-port", "70000"], "above 65535"),
        (["--format", "npz", "--verify"], "not with --format npz"),
    ],
)
def test_what_cannot_be_is_told_first(
    words: list[str], told: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [shard] = write_shards(tmp_path / "in", "image", [1])
    assert bulk(models["image"], [shard], tmp_path / "out", *words) in (1, 2)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("kind", READERS)
def test_a_shard_without_a_sample_of_the_modality_has_no_file_that_readers_fail_on(
    kind: str, models: dict[str, Path], sounds: list[Path], tmp_path: Path
) -> None:
    empty = write_tar(tmp_path / "empty.tar", [("a.txt", b"no sound"), ("b.txt", b"none either")])
    broken = write_tar(tmp_path / "broken.tar", [("a.flac", b"fLaC and no more")])
    out = tmp_path / "out"
    assert bulk(models["audio"], [sounds[0], empty, broken], out, "--format", kind, "--max-corrupt", "1") == 0
    assert READERS[kind](out).keys() == {f"k{number:03d}" for number in range(5)}
    assert len(list(Corpus(str(out)))) == 5
    assert bulk(models["audio"], [sounds[0], empty, broken], out, "--format", kind, "--verify") == 0
    if kind != "jsonl":
        assert main(["pack", str(out), "--length", "100", "--out", str(tmp_path / "packed")]) == 0
        rows = datasets.load_dataset(str(tmp_path / "packed"), split="train", streaming=True)
        assert {len(row["input_ids"]) for row in rows} == {100}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_shards_whose_samples_have_other_members_are_read_as_one_data_set(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    [(extension, data)] = sample_media("image", 1)
    others = [("json", b'{"label": "dog"}'), ("txt", b"a dog"), ("txt", b"\xe9t\xe9"), ("raw", b"1")]
    shards = [
        write_tar(tmp_path / f"s{i}.tar", [(f"a{i}.{extension}", data), (f"a{i}.{name}", content)])
        for i, (name, content) in enumerate(others)
    ]
    assert bulk(models["image"], shards, tmp_path / "out", "--format", kind) == 0
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    assert sorted(row["key"] for row in rows) == ["a0", "a1", "a2", "a3"]
    assert sorted(row.labels for row in Corpus(str(tmp_path / "out"))) == [[], [], [], ["dog"]]


def test_a_text_tokenizer_that_cuts_and_pads_does_neither_here(
    models: dict[str, Path], text_tokenizer: Path, tmp_path: Path
) -> None:
    [(extension, data)] = sample_media("image", 1)
    shard = write_tar(tmp_path / "s.tar", [(f"a.{extension}", data)])
    tokenizer = Tokenizer.from_file(str(text_tokenizer / "tokenizer.json"))
    expected = tokenizer.encode("a sound of a dog", add_special_tokens=False).ids
    for change in (lambda: tokenizer.enable_padding(length=64), lambda: tokenizer.enable_truncation(1)):
        change()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    more = ["--template", "a sound of a dog{codes}", "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert bulk(models["image"], [shard], tmp_path / "out", *more) == 0
    corpus = Corpus(str(tmp_path / "out"))
    [row] = corpus
    assert row.ids is not None
    assert row.ids[: list(row.ids).index(corpus.tokens.ids.begin)].tolist() == expected


def test_time_marks_stand_where_their_second_begins_though_the_last_step_is_not_full(
    models: dict[str, Path], tmp_path: Path
) -> None:
    sound, seconds, step = tmp_path / "long.wav", 15.3, 0.16
    soundfile.write(sound, 0.1 * np.sin(np.arange(round(16_000 * seconds)) / 20), 16_000)
    assert bulk(models["audio"], [sound], tmp_path / "out", "--time-marks", "1") == 0
    corpus = Corpus(str(tmp_path / "out"))
    [row] = corpus
    assert row.ids is not None and row.duration_s == seconds
    marks = np.flatnonzero(row.ids > corpus.tokens.ids.end) - 1
    marks = marks[marks < len(row.ids) - 2]
    before = (marks - np.arange(len(marks))) // (3 * row.grid["frequency"])
    assert before.tolist() == [math.ceil(second / step - 1e-9) for second in range(16)]


@pytest.mark.parametrize(
    ("local", "more", "told"),
    [
        ("3", ["--device", "cuda"], "LOCAL_RANK 3 has no device: this process sees 2"),
        ("3", ["--metrics-port", "65534"], "with local rank 3 port 65537, above 65535"),
        ("x", [], "found ['3', '4', 'x'], expected numbers"),
    ],
)
def test_a_rank_tells_what_the_first_of_its_machine_does_not_meet(
    local: str,
    more: list[str],
    told: str,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as seen:
        seen.setattr("torch.cuda.device_count", lambda: 2)
        assert main(["tokenize", str(models["audio"]), "x.wav", "--out", "codes", *more]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["tokenize", "MODEL", "FILE", "--format", "npz", "--out", "s3://bucket/codes"],
        ["corpus", "CODES", "--out", "s3://bucket/page"],
        ["export", "RUN", "s3://bucket/model"],
    ],
)
def test_a_url_is_no_folder_called_s3(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert "of this machine" in (told := capsys.readouterr().err) or "on this machine" in told
    assert not list(tmp_path.glob("s3*"))
