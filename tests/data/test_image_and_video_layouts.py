"""ImageNet's and Kinetics' layouts through `bridle shards build`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bridle.cli import main
from bridle.data.build import Built
from bridle.data.build import build as build_plan
from bridle.data.errors import ShardError
from bridle.data.importers import RawDataSet, plan
from bridle.data.shards import Sample, open_shards

Tree = Callable[[dict[str, bytes]], Path]
DOG, CAT = "n02085620", "n02123045"
HEAD = b"label,youtube_id,time_start,time_end,split\n"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A folder of files."""

    def write(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes(content)
        return tmp_path / "source"

    return write


def built(kind: str, source: Path, target: Path, *options: str) -> dict[str, Sample]:
    assert main(["shards", "build", "--kind", kind, str(source), str(target), *options]) == 0
    shards = open_shards([f"{target}/*.tar"], extensions=[])
    return {sample.key: sample for sample in (shards.read(i) for i in range(len(shards)))}


def missing(target: Path) -> list[str]:
    listed = target / "missing.txt"
    return listed.read_text().splitlines() if listed.exists() else []


def test_label_folders_of_images(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{DOG}/{DOG}_1.JPEG": b"1", f"{DOG}/images/{DOG}_2.jpg": b"2", f"{CAT}/{CAT}_1.png": b"3"}
    stray = {f"{CAT}/boxes.txt": b"x", "thumb.png": b"x", f"{CAT}/empty.JPEG": b""}
    found = built("imagefolder", tree({**files, **stray}), tmp_path / "out")
    assert {key: sample.data for key, sample in found.items()} == {
        f"{DOG}/{DOG}_1": b"1", f"{DOG}/images/{DOG}_2": b"2", f"{CAT}/{CAT}_1": b"3"
    }  # fmt: skip
    assert found[f"{DOG}/images/{DOG}_2"].about == {"label": DOG, "source": f"{DOG}/images/{DOG}_2.jpg"}
    assert found[f"{DOG}/{DOG}_1"].extension == "jpeg"
    assert missing(tmp_path / "out") == [f"{CAT}/empty.JPEG"]
    told = capsys.readouterr().err
    assert "2 other files left out" in told and "3/3 samples" in told and "MB/s" in told


def test_splits_are_kept_apart(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree({f"train/{DOG}/a.JPEG": b"1", f"val/{DOG}/b.JPEG": b"2", "notes.txt": b"x"})
    assert main(["shards", "build", "--kind", "imagefolder", str(root), str(tmp_path / "both")]) == 1
    assert "holds several splits (train, val); choose one with --split" in capsys.readouterr().err
    train = built("imagefolder", root, tmp_path / "train", "--split", "train")
    assert list(train) == [f"{DOG}/a"] and train[f"{DOG}/a"].labels == [DOG]
    assert list(built("imagefolder", root, tmp_path / "val", "--split", "validation")) == [f"{DOG}/b"]
    assert list(built("imagefolder", root / "train", tmp_path / "direct")) == [f"{DOG}/a"]


def test_a_class_named_like_a_split_is_a_class(tree: Tree, tmp_path: Path) -> None:
    found = built("imagefolder", tree({"train/a.png": b"1", "plane/b.png": b"2"}), tmp_path / "out")
    assert {key: sample.labels for key, sample in found.items()} == {"train/a": ["train"], "plane/b": ["plane"]}


VAL = "ILSVRC2012_val_0000000"
TABLES = {
    "LOC_val_solution.csv": [
        "ImageId,PredictionString",
        f"{VAL}2,{DOG} 85 1 499 272 ",
        f"{VAL}1,{CAT} 1 2 3 4 {CAT} 5 6 7 8 ",
        f"{VAL}3,{CAT} 1 1 2 2 ",
    ],
    "val.txt": [f"{VAL}1.JPEG 281 {CAT}", f"{VAL}2.JPEG 151 {DOG}", f"{VAL}3.JPEG 281 {CAT}"],
    "val_annotations.txt": [f"{VAL}{i}.JPEG\t{label}\t0\t32\t44\t62" for i, label in ((1, CAT), (2, DOG), (3, DOG))],
    "imagenet_2012_validation_synset_labels.txt": [CAT, DOG, DOG],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_flat_folder_takes_its_labels_from_a_table(tree: Tree, tmp_path: Path, name: str) -> None:
    table = "".join(f"{line}\n" for line in TABLES[name]).encode()
    root = tree({f"val/{VAL}1.JPEG": b"1", f"val/{VAL}2.JPEG": b"2", name: table})
    found = built("imagefolder", root / "val", tmp_path / "out", "--table", str(root / name))
    assert {key: sample.labels for key, sample in found.items()} == {f"{VAL}1": [CAT], f"{VAL}2": [DOG]}
    assert missing(tmp_path / "out") == ["line 3" if "synset" in name else f"{VAL}3"]


@pytest.mark.parametrize(
    ("files", "options", "match"),
    [
        (
            {"a.png": b"1", "b.png": b"1"},
            {},
            r"2 images, such as a\.png, stand in no label's folder; name their labels",
        ),
        ({"a.png": b"1", "t": b""}, {"table": "t"}, "holds no labels; expected lines"),
        ({"a.png": b"1", "t": b"a 1\nb\n"}, {"table": "t"}, "'b' stands alone"),
        ({"a.png": b"1", "t": b"\xff\xfe"}, {"table": "t"}, "not a text in UTF-8"),
        ({"a.png": b"1"}, {"table": "t"}, "No such file or directory; name the file of labels with --table"),
        ({"a.png": b"1", "t": b"b.png 1\n"}, {"table": "t"}, r"no sample .* \(1 files are missing or empty, 1 others"),
        ({"train/x/a.png": b"1"}, {"split": "val"}, "no folder of split 'val' in it"),
        ({"train/x/a.png": b"1"}, {"split": "trian"}, "split 'trian' is unknown; did you mean 'train'"),
    ],
)
def test_images_laid_out_otherwise_are_refused(
    tree: Tree, files: dict[str, bytes], options: dict[str, str], match: str
) -> None:
    root = tree(files)
    table = root / options["table"] if "table" in options else None
    with pytest.raises(ShardError, match=match) as error:
        plan("imagefolder", RawDataSet(root, table, options.get("split")))
    assert "\n" not in str(error.value)


def test_an_option_that_a_kind_does_not_know_is_refused(tree: Tree) -> None:
    root = tree({"x/a.wav": b"1"})
    with pytest.raises(ShardError, match="--split means nothing to kind folder"):
        plan("folder", RawDataSet(root, None, "train"))
    with pytest.raises(ShardError, match="--table means nothing to kind esc50"):
        plan("esc50", RawDataSet(root, root / "t"))


@pytest.mark.parametrize(
    "template",
    [
        "train/riding a bike/{}_000010_000020.mp4",
        "riding_a_bike/{}_10_20.webm",
        "{}_000010_000020.mp4",
        "{}.mp4",
        "videos/{}.mkv",
    ],
)
def test_kinetics_finds_its_files_in_every_layout(tree: Tree, tmp_path: Path, template: str) -> None:
    table = HEAD + b"riding a bike,-0abcdefghi,10,20,train\nswimming,goneGONE-12,0,10,train\n"
    found = built("kinetics", tree({"k.csv": table, template.format("-0abcdefghi"): b"film"}), tmp_path / "out")
    (key, sample), = found.items()  # fmt: skip
    assert (key, sample.data) == ("-0abcdefghi_000010_000020", b"film")
    assert sample.about == {
        "label": "riding a bike", "split": "train", "source": "-0abcdefghi", "start_s": 10, "end_s": 20
    }  # fmt: skip
    assert missing(tmp_path / "out") == ["goneGONE-12_000000_000010 (line 3)"]


def test_kinetics_keeps_segments_labels_and_copies_apart(tree: Tree, tmp_path: Path) -> None:
    a, b, c = "aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc"
    rows = [f"run,{a},0,10,val", f"run,{a},10,20,val", f"run,{b},0,10,val", f"run,{b},0,10,val", f"swim,{b},0,10,val"]
    rows += [f"swim,{c},5.0,15.0,validate"]
    files = {
        f"x/{a}_000010_000020.mp4": b"a2", f"x/{a}.mp4": b"which?", f"other/{b}_000000_000010.mp4": b"",
        f"run/{b}_000000_000010.mp4": b"run", f"swim/{b}_000000_000010.mp4": b"swim", f"{c}.avi": b"c", "readme": b"x",
    }  # fmt: skip
    root = tree({"val.csv": HEAD + "\n".join(rows).encode(), **files})
    found = plan("kinetics", RawDataSet(root))
    kept = sorted((sample.meta["label"], sample.source.read_bytes()) for sample in found.samples)
    assert kept == [("run", b"a2"), ("run", b"run"), ("swim", b"c"), ("swim", b"swim")]
    assert found.missing == [f"{a}_000000_000010 (line 2)"]  # aaaaaaaaaaa.mp4 does not say which segment it is
    assert found.ignored == 3
    assert {sample.key for sample in found.samples} == {
        sample.key for sample in plan("kinetics", RawDataSet(root)).samples
    }
    assert len(built("kinetics", root, tmp_path / "out")) == 4


def test_kinetics_takes_the_split_that_is_asked_for(tree: Tree, tmp_path: Path) -> None:
    a, b, c = "aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc"
    root = tree(
        {
            "annotations/k600_train.csv": HEAD + f"run,{a},0,10,train\n".encode(),
            "annotations/k600_validate.csv": HEAD + f"run,{b},0,10,validate\n".encode(),
            "annotations/k600_test.csv": f"youtube_id,time_start,time_end,split\n{c},0,10,test\n".encode(),
            f"train/{a}_000000_000010.mp4": b"a", f"val/{b}_000000_000010.mp4": b"b", f"test/{c}.mp4": b"c",
        }
    )  # fmt: skip
    with pytest.raises(ShardError, match=r"holds several splits \(test, train, val\); choose one with --split"):
        plan("kinetics", RawDataSet(root))
    found = {split: built("kinetics", root, tmp_path / split, "--split", split) for split in ("train", "val", "test")}
    assert [[sample.data for sample in samples.values()] for samples in found.values()] == [[b"a"], [b"b"], [b"c"]]
    assert found["test"][f"{c}_000000_000010"].labels == []


def test_one_table_of_several_splits_is_filtered(tree: Tree) -> None:
    a, b = "aaaaaaaaaaa", "bbbbbbbbbbb"
    table = HEAD + f"run,{a},0,10,train\nrun,{b},0,10,val\n".encode()
    root = tree({"all.csv": table, f"{a}.mp4": b"a", f"{b}.mp4": b"b"})
    with pytest.raises(ShardError, match=r"all\.csv: holds several splits \(train, val\)"):
        plan("kinetics", RawDataSet(root))
    assert [sample.source.name for sample in plan("kinetics", RawDataSet(root, split="val")).samples] == [f"{b}.mp4"]
    with pytest.raises(ShardError, match="holds no row of split 'test', only of: train, val"):
        plan("kinetics", RawDataSet(root, split="test"))


def test_kinetics_without_a_table_goes_by_its_folders(tree: Tree, tmp_path: Path) -> None:
    files = {"train/run/aaaaaaaaaaa_000003_000013.mp4": b"1", "train/swim/bbbbbbbbbbb.mp4": b"2", "train/x.mp4": b"3"}
    found = built("kinetics", tree(files), tmp_path / "out")
    assert found["aaaaaaaaaaa_000003_000013"].about == {
        "label": "run", "source": "aaaaaaaaaaa", "start_s": 3, "end_s": 13
    }  # fmt: skip
    assert found["bbbbbbbbbbb"].about == {"label": "swim", "source": "bbbbbbbbbbb"} and found["x"].labels == []


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"a.csv": b"id,start\n"}, "column 'time_end' is missing; found: id, start"),
        ({"a.csv": HEAD + b"run,aaaaaaaaaaa,soon,10,train\n"}, "line 2: time_start 'soon' is not a whole number"),
        ({"a.csv": HEAD, "b.csv": HEAD}, r"several tables \(a\.csv, b\.csv\); choose one with --table FILE or --split"),
        ({"run/a.wav": b"1"}, r"no sample of kind kinetics found \(0 files are missing or empty, 1 others do not"),
    ],
)
def test_videos_laid_out_otherwise_are_refused(tree: Tree, files: dict[str, bytes], match: str) -> None:
    with pytest.raises(ShardError, match=match):
        plan("kinetics", RawDataSet(tree(files)))


def images(count: int) -> dict[str, bytes]:
    return {f"{(DOG, CAT)[i % 2]}/{i}.JPEG": bytes([i]) * 700 for i in range(count)}


def test_any_number_of_jobs_writes_the_same_bytes(tree: Tree, tmp_path: Path) -> None:
    root = tree(images(30))
    for jobs in ("1", "8"):
        built("imagefolder", root, tmp_path / jobs, "--samples-per-shard", "2", "--jobs", jobs)
    files = [{path.name: path.read_bytes() for path in (tmp_path / jobs).glob("shard-*")} for jobs in ("1", "8")]
    assert files[0] == files[1] and len(files[0]) == 30


def test_a_broken_link_is_a_missing_file(tree: Tree, tmp_path: Path) -> None:
    root = tree({"k.csv": HEAD + b"run,aaaaaaaaaaa,0,10,train\n", f"{DOG}/a.png": b"1"})
    (root / "aaaaaaaaaaa.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (root / DOG / "b.png").symlink_to(tmp_path / "nowhere.png")
    assert plan("imagefolder", RawDataSet(root)).missing == [f"{DOG}/b.png"]
    with pytest.raises(ShardError, match="1 files are missing or empty"):
        plan("kinetics", RawDataSet(root))


def test_a_file_that_goes_away_is_named_and_its_shard_is_tried_again(tree: Tree, tmp_path: Path) -> None:
    root, out = tree(images(12)), tmp_path / "out"
    found = plan("imagefolder", RawDataSet(root))
    seen: list[int] = []

    def build() -> Built:
        return build_plan(
            found, out, shard_bytes=10**9, samples_per_shard=4, jobs=3, progress=lambda done: seen.append(done.shards)
        )

    gone = found.samples[5].source
    content = gone.read_bytes()
    gone.unlink()
    first = build()
    assert (first.samples, first.missing) == (11, [str(gone)]) and missing(out) == [str(gone)] and seen == [1, 2, 3]
    gone.write_bytes(content)
    second = build()
    assert (second.samples, second.kept_shards, second.kept_samples, second.missing) == (12, 2, 8, [])
    assert missing(out) == [] and build().kept_shards == 3


def test_a_source_that_goes_away_altogether_stops_the_build(tree: Tree, tmp_path: Path) -> None:
    root = tree(images(8))
    found = plan("imagefolder", RawDataSet(root))
    for path in root.rglob("*.JPEG"):
        path.unlink()
    with pytest.raises(ShardError, match=r"all 4 files of shard-00000\d\.tar; check the disk"):
        build_plan(found, tmp_path / "out", shard_bytes=10**9, samples_per_shard=4, jobs=2, progress=lambda done: None)
    assert not list((tmp_path / "out").glob("*.tar"))
