"""Bulk tokenization, through the command: what real readers find is what `bridle tokenize FILE` gives."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_inputs import hashes, sample_media, write_model, write_shards, write_tar
from fsspec.implementations.memory import MemoryFileSystem

import bridle
from bridle.cli import main
from bridle.data.shards import open_shards
from bridle.tokens.bulk import VOCABULARY
from bridle.tokens.corpus import Corpus
from bridle.tokens.layouts import from_text
from bridle.tokens.vocabulary import IdSpace, id_space_from_json


def bulk(model: Path, inputs: list[Any], out: Path | str, *more: str, workers: int = 0) -> int:
    return main(["tokenize", str(model), *map(str, inputs), "--out", str(out), "--workers", str(workers), *more])


def manifest(out: Path) -> dict[str, Any]:
    found = json.loads((out / "manifest.json").read_text())
    assert isinstance(found, dict)
    return found


def vocabulary(out: Path) -> IdSpace:
    return id_space_from_json(json.loads((out / VOCABULARY).read_text()), VOCABULARY)


def expected_codes(model: Path, shards: list[Path], modality: str) -> dict[str, np.ndarray]:
    """Codes [M, N] by key, one file at a time."""
    loaded = bridle.load(model)
    found = open_shards([str(path) for path in shards], extensions=loaded.modality.extensions)
    samples = [found.read(i) for i in range(len(found))]
    return {sample.key: loaded.tokenize(sample.data).codes.T.numpy() for sample in samples}


def of_parquet(out: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import datasets

    rows = datasets.load_dataset(str(out), split="train", streaming=True)
    found = {row["key"]: (np.array(row["codes"]), np.array(row["input_ids"])) for row in rows}
    row = next(iter(rows))
    number = int(row["key"][1:])
    assert (row["labels"], row["caption"]) == ([f"l{number % 3}"], f"text of {number}")
    assert {"name": "raw", "content": bytes([255, number])} in row["members"]
    return found


def of_webdataset(out: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import webdataset

    found = {}
    for path in sorted((out / "data").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            key = sample["__key__"]
            number = int(key[1:])
            assert (sample["txt"], sample["json"]["label"]) == (f"text of {number}", f"l{number % 3}")
            assert sample["raw"] == bytes([255, number])
            assert np.prod(list(sample["codes.json"]["grid"].values())) == sample["codes.npy"].shape[1]
            found[key] = sample["codes.npy"], sample["ids.npy"]
    return found


def of_megatron(out: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens, found = vocabulary(out).of("audio"), {}
    for path in sorted((out / "data").glob("*.idx")):
        prefix = str(path.with_suffix(""))
        dataset = IndexedDataset(prefix)
        about = [json.loads(line) for line in Path(f"{prefix}.samples.jsonl").read_text().splitlines()]
        assert len(dataset) == len(about) == len(dataset.document_indices) - 1
        for number, line in enumerate(about):
            ids = np.array(dataset[number], np.int64)
            assert len(ids) == line["tokens"]
            found[line["key"]] = tokens.decode(ids).T, ids
    return found


def of_jsonl(out: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
    tokens, found = vocabulary(out).of("audio"), {}
    for path in sorted((out / "data").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            modality, codes = from_text(row["text"], tokens.ids)
            assert modality == "audio"
            found[row["key"]] = codes.T, np.array(tokenizer(row["text"])["input_ids"])
    return found


READERS = {"parquet": of_parquet, "webdataset": of_webdataset, "megatron": of_megatron, "jsonl": of_jsonl}


@pytest.mark.parametrize("kind", READERS)
def test_real_readers_find_the_codes_of_single_files(
    kind: str, models: dict[str, Path], sounds: list[Path], text_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert bulk(models["audio"], sounds, out, "--format", kind, "--tokenizer", str(text_tokenizer)) == 0
    expected = expected_codes(models["audio"], sounds, "audio")
    found = READERS[kind](out)
    assert found.keys() == expected.keys()
    tokens = vocabulary(out).of("audio")
    assert tokens.ids.offset == 270
    for key, (codes, ids) in found.items():
        np.testing.assert_array_equal(codes, expected[key])
        np.testing.assert_array_equal(ids, tokens.encode(expected[key].T))
    summary = manifest(out)["summary"]
    assert summary["samples"] == 12
    assert summary["codes"] == sum(codes.size for codes in expected.values())
    assert summary["tokens"] == sum(ids.size for _, ids in found.values())
    assert bulk(models["audio"], sounds, out, "--verify") == 0


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pictures_and_films_too(modality: str, models: dict[str, Path], tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", modality, [3, 2])
    out = tmp_path / "out"
    assert bulk(models[modality], shards, out) == 0
    expected = expected_codes(models[modality], shards, modality)
    found = of_parquet(out)
    assert found.keys() == expected.keys()
    for key, (codes, _) in found.items():
        np.testing.assert_array_equal(codes, expected[key])


def test_bytes_do_not_depend_on_workers_restarts_or_torn_files(
    models: dict[str, Path], sounds: list[Path], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert bulk(models["audio"], sounds, one, workers=0) == 0
    assert bulk(models["audio"], sounds, two, workers=2) == 0
    assert not multiprocessing.active_children()
    assert hashes(one) == hashes(two)
    data = sorted((two / "data").iterdir())
    before = data[2].stat().st_mtime_ns
    data[0].unlink()
    data[1].write_bytes(data[1].read_bytes()[:-100])
    assert bulk(models["audio"], sounds, two, workers=1) == 0
    assert hashes(one) == hashes(two)
    assert data[2].stat().st_mtime_ns == before
    assert not any((two / "claims").iterdir())


def test_a_folder_and_a_list_of_files_keep_every_name(models: dict[str, Path], tmp_path: Path) -> None:
    media = sample_media("audio", 5)
    names = ["dogs/v1.0.a", "dogs/v1.0.b", "cats/żółw w lesie", "cats/" + "x" * 240, "top"]
    for name, (extension, data) in zip(names, media, strict=True):
        path = tmp_path / "in" / f"{name}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "in" / "notes.md").write_text("not media")
    for kind in ("parquet", "webdataset"):
        out = tmp_path / kind
        assert bulk(models["audio"], [tmp_path / "in"], out, "--format", kind, "--files-per-output", "2") == 0
        assert manifest(out)["summary"]["samples"] == 5
        assert len(manifest(out)["parts"]) == 3
    import datasets

    rows = list(datasets.load_dataset(str(tmp_path / "parquet"), split="train", streaming=True))
    members = [{member["name"]: member["content"] for member in row["members"]} for row in rows]
    assert {json.loads(found["json"])["source"].rsplit(".", 1)[0] for found in members} == set(names)
    assert len({row["key"] for row in rows}) == 5
    assert len(list(open_shards([str(tmp_path / "webdataset/data/*.tar")], extensions=["codes.npy"]).counts)) == 3


def test_corrupt_samples_are_counted_and_named(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = sample_media("audio", 3)
    flac = media[0][1]
    picture = sample_media("image", 1)[0][1]
    members = [
        ("good.flac", flac),
        ("broken.flac", b"fLaC" + bytes(300)),
        ("picture.flac", picture),
        ("empty.flac", b""),
        ("twins.flac", flac),
        ("twins.wav", flac),
        ("film.flac", flac),
        ("film.mp4", b"carried by nobody"),
        ("words.txt", b"no media at all"),
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    out = tmp_path / "out"
    assert bulk(models["audio"], [shard], out, "--max-corrupt", "0.5") == 1
    said = capsys.readouterr().err
    assert "4 of 6 samples could not be read, more than --max-corrupt 0.5" in said
    assert not (out / "manifest.json").exists()
    assert bulk(models["audio"], [shard], out, "--max-corrupt", "0.7") == 0
    (part,) = manifest(out)["parts"]
    assert (part["samples"], part["without"]) == (2, 1)
    reasons = {skip["key"]: skip["reason"] for skip in part["skipped"]}
    assert reasons.keys() == {"broken", "picture", "empty", "twins"}
    assert "flac, wav" in reasons["twins"]
    assert all(reasons.values())


def test_what_is_not_this_job_is_refused(
    models: dict[str, Path], sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shards = [write_tar(tmp_path / "a.tar", [("k.flac", sample_media("audio", 1)[0][1])])]
    assert bulk(models["audio"], shards, out) == 0
    before = hashes(out)
    other = write_model(tmp_path / "other", "audio", seed=1)
    for arguments, said in [
        ((other, shards, out), "another model: sha256 was"),
        ((models["audio"], shards, out, "--layout", "delay"), "another settings: layout was 'interleaved'"),
        ((models["audio"], shards, tmp_path), "holds files, but no job.json"),
        ((models["audio"], [*shards, tmp_path / "x.wav"], tmp_path / "new"), "is a shard and"),
        ((models["audio"], [tmp_path / "x.wav"], tmp_path / "new"), "no such file"),
        ((models["image"], shards, tmp_path / "new"), "no sample with a member of"),
        ((models["audio"], shards, tmp_path / "new", "--template", "{txt} {codes}"), "needs a tokenizer"),
        ((models["audio"], shards, tmp_path / "new", "--template", "{txt}"), "0 times"),
        ((models["audio"], shards, tmp_path / "new", "--template", "{codes"), "braces"),
        ((models["audio"], shards, tmp_path / "new", "--delays", "0,1", "--layout", "delay"), "2 numbers for 3"),
        (
            (models["audio"], shards, tmp_path / "new", "--layout", "parallel", "--format", "megatron"),
            "holds flat documents",
        ),
        ((models["audio"], shards, tmp_path / "new", "--layout", "coarse_first", "--time-marks", "1"), "time marks"),
    ]:
        assert bulk(*arguments) in (1, 2)  # type: ignore[arg-type]
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert hashes(out) == before
    write_tar(shards[0], [("k.flac", sample_media("audio", 2)[1][1])])
    for index in shards[0].parent.glob("*.index"):
        index.unlink()
    assert bulk(models["audio"], shards, out) == 1
    assert "has changed since it was tokenized" in capsys.readouterr().err
    assert hashes(out) == before


def test_verify_finds_what_was_damaged(
    models: dict[str, Path], sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert bulk(models["audio"], sounds, out) == 0
    first, second, third = sorted((out / "data").iterdir())
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.unlink()
    (out / "data" / "stranger.parquet").write_bytes(b"?")
    assert bulk(models["audio"], [], out, "--verify") == 1
    error = capsys.readouterr().err
    assert f"{first.name}: sha256" in error
    assert f"{second.name}: missing" in error
    assert "stranger.parquet: not in the manifest" in error
    assert third.name not in error


@pytest.mark.parametrize("layout", ["interleaved", "delay", "coarse_first", "parallel"])
def test_every_layout_comes_back(layout: str, models: dict[str, Path], sounds: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--time-marks", "0.5"] if layout in ("interleaved", "delay") else []
    assert bulk(models["audio"], sounds[1:2], out, "--layout", layout, *more) == 0
    tokens = vocabulary(out).of("audio")
    for codes, ids in of_parquet(out).values():
        np.testing.assert_array_equal(tokens.decode(ids).T, codes)
        marks = (ids > tokens.ids.end).sum()
        assert (marks > 0) == bool(more)
        assert ids.ndim == (2 if layout == "parallel" else 1)


def test_a_template_puts_text_around_the_codes(
    models: dict[str, Path], sounds: list[Path], text_tokenizer: Path, tmp_path: Path
) -> None:
    import transformers

    template = "A sound of {label}: {codes} ({txt}, {json.caption}{json.none})"
    texts, ids = {}, {}
    for kind in ("jsonl", "megatron", "parquet"):
        out = tmp_path / kind
        more = ["--format", kind, "--template", template, "--tokenizer", str(text_tokenizer)]
        assert bulk(models["audio"], sounds[:1], out, *more) == 0
        if kind == "jsonl":
            for line in next((out / "data").iterdir()).read_text().splitlines():
                texts[json.loads(line)["key"]] = json.loads(line)["text"]
        elif kind == "parquet":
            ids = {key: found for key, (_, found) in of_parquet(out).items()}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    assert texts["k001"].startswith("A sound of l1: <|audio|><|audio:0:")
    assert texts["k001"].endswith("<|/audio|> (text of 1, sound 1)")
    assert texts.keys() == ids.keys()
    for key, text in texts.items():
        assert tokenizer(text)["input_ids"] == ids[key].tolist()
        assert tokenizer.decode(ids[key]) == text


def test_a_full_disk_costs_no_good_output(
    models: dict[str, Path], sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands in for the disk: the first outputs fit, the longest does not."""
    import resource

    out = tmp_path / "out"
    assert bulk(models["audio"], sounds, tmp_path / "whole", "--format", "webdataset") == 0
    whole = {path.name: path.stat().st_size for path in (tmp_path / "whole" / "data").iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = max(whole.values()) - 1
    assert limit > 4096
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        assert bulk(models["audio"], sounds, out, "--format", "webdataset") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in capsys.readouterr().err
    for path in (out / "data").iterdir():
        assert path.stat().st_size == whole[path.name]
    assert bulk(models["audio"], sounds, out, "--format", "webdataset") == 0
    assert hashes(out) == hashes(tmp_path / "whole")


def test_any_store_that_fsspec_knows_takes_the_output(
    models: dict[str, Path], sounds: list[Path], tmp_path: Path
) -> None:
    store = MemoryFileSystem()
    assert bulk(models["audio"], sounds, tmp_path / "disk") == 0
    for _ in range(2):  # the second finds it done
        assert bulk(models["audio"], sounds, "memory://codes/some/where") == 0
    disk = {path.relative_to(tmp_path / "disk").as_posix(): path for path in (tmp_path / "disk/data").iterdir()}
    stored = {name.removeprefix("/codes/some/where/"): name for name in store.find("/codes/some/where/data")}
    assert stored.keys() == disk.keys()
    assert all(store.cat_file(stored[name]) == path.read_bytes() for name, path in disk.items())
    assert bulk(models["audio"], sounds, "memory://codes/some/where", "--verify") == 0
    assert len(list(Corpus("memory://codes/some/where"))) == 12
    store.pipe_file(next(iter(stored.values())), b"damaged")
    assert bulk(models["audio"], sounds, "memory://codes/some/where", "--verify") == 1
    store.store.clear()


def test_no_leftover_stands_in_the_output(models: dict[str, Path], sounds: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bulk(models["audio"], sounds, out) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md",
        "claims",
        "data",
        "job.json",
        "manifest.json",
        "parts",
        "tokenizer",
        "vocabulary.json",
    }
    assert not list(out.rglob(".*"))
