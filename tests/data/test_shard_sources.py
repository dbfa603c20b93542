"""What a build is made of: sources that stay apart, clips held out, and files that no modality reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shard_inputs import MakeTar, Tree, build, clips, samples

from bridle.cli import main
from bridle.data.shards import open_shards
from bridle.modalities import modality_class
from bridle.modalities.clip import EXTENSIONS


def test_another_source_never_takes_the_place_of_a_first(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tree(clips(30)), tmp_path / "out"
    assert build("folder", first, out, "--samples-per-shard", "7") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    second = tmp_path / "second"
    (second / "x").mkdir(parents=True)
    (second / "x" / "one.wav").write_bytes(b"1")
    (second / "x" / "two.wav").write_bytes(b"2")
    capsys.readouterr()
    assert build("folder", second, out) == 1
    (line,) = capsys.readouterr().err.splitlines()[2:]
    assert f"holds shards of another source (folder {first}) than this one (folder {second}); choose an empty" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    assert build("folder", second, out, "--overwrite") == 0
    assert sorted(samples(out)) == ["x/one", "x/two"]
    assert len(list(out.glob("*.index"))) == 1


def test_the_same_names_and_sizes_of_another_source_are_not_taken_for_the_first(tree: Tree, tmp_path: Path) -> None:
    first, out, second = tree({"a.wav": b"11"}), tmp_path / "out", tmp_path / "second"
    assert build("folder", first, out) == 0
    second.mkdir()
    (second / "a.wav").write_bytes(b"22")
    assert build("folder", second, out) == 1
    assert build("folder", second, out, "--overwrite") == 0
    assert samples(out)["a"].data == b"22"


def test_a_source_that_lost_files_replaces_nothing(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tree(clips(30)), tmp_path / "out"
    assert build("folder", root, out) == 0
    for path in sorted(root.rglob("*.wav"))[:20]:
        path.unlink()
    assert build("folder", root, out) == 1
    assert "was built of 30 samples, but" in capsys.readouterr().err and len(samples(out)) == 30
    assert build("folder", root, out, "--overwrite") == 0
    assert len(samples(out)) == 10


def test_shards_of_an_unknown_source_are_kept_where_they_are_the_same_and_refused_where_not(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tree({"a.wav": b"11", "b.wav": b"2"}), tmp_path / "out"
    assert build("folder", root, out) == 0
    (out / "source.json").unlink()
    assert build("folder", root, out) == 0
    (out / "source.json").unlink()
    (root / "b.wav").write_bytes(b"longer")
    assert build("folder", root, out) == 1
    assert "holds shards of a source that is not known (shard-000000.tar has other samples)" in capsys.readouterr().err
    assert samples(out)["b"].data == b"2"


def test_a_file_edited_in_place_reaches_its_shard(tree: Tree, tmp_path: Path) -> None:
    root, out = tree({"a.wav": b"11", "b.wav": b"22"}), tmp_path / "out"
    assert build("folder", root, out) == 0
    (root / "a.wav").write_bytes(b"33")
    assert build("folder", root, out) == 0
    assert samples(out)["a"].data == b"33"


def test_heldout_takes_the_share_of_every_label_and_whole_groups(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{label}/{i}.wav": f"{label}{i}".encode() for label in "abcd" for i in range(40)}
    files |= {f"talk/day_{day}/{i}.wav": f"{day} {i}".encode() for day in range(20) for i in range(4)}
    root, out = tree(files), tmp_path / "out"
    assert build("folder", root, out, "--heldout", "0.1", "--samples-per-shard", "50") == 0
    train, heldout = samples(out), samples(out / "heldout")
    assert {key: sample.data for key, sample in (train | heldout).items()} == {
        name.removesuffix(".wav"): content for name, content in files.items()
    }
    assert not train.keys() & heldout.keys() and len(heldout) == 24
    for label in "abcd":
        assert sum(key.startswith(f"{label}/") for key in heldout) == 4
    days = [{key.split("/")[1] for key in part if key.startswith("talk/")} for part in (train, heldout)]
    assert len(days[1]) == 2 and not days[0] & days[1]
    assert f"--data '{out}/*.tar' --heldout '{out}/heldout/*.tar'" in capsys.readouterr().err
    assert build("folder", root, out) == 1  # the held-out clips would go into the training shards
    assert f"another source (folder {root} --heldout 0.1) than this one (folder {root})" in capsys.readouterr().err


def test_heldout_keeps_recordings_of_esc50_together(tree: Tree, tmp_path: Path) -> None:
    names = [f"1-{recording}-{take}-0.wav" for recording in range(20) for take in "ABC"]
    table = "filename,fold,target,category\n" + "".join(f"{name},1,0,dog\n" for name in names)
    root = tree({"meta/esc50.csv": table.encode(), **{f"audio/{name}": name.encode() for name in names}})
    assert build("esc50", root, tmp_path / "out", "--heldout", "0.2") == 0
    train, heldout = samples(tmp_path / "out"), samples(tmp_path / "out" / "heldout")
    assert (len(train), len(heldout)) == (48, 12)
    assert not {key.split("-")[1] for key in train} & {key.split("-")[1] for key in heldout}


def test_a_few_clips_still_hold_one_out(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(clips(4))
    assert build("folder", root, tmp_path / "out", "--heldout", "0.01") == 0
    assert (len(samples(tmp_path / "out")), len(samples(tmp_path / "out" / "heldout"))) == (3, 1)
    with pytest.raises(SystemExit):
        build("folder", root, tmp_path / "other", "--heldout", "0.6")
    assert "'0.6' is not a share above 0 and at most 0.5" in capsys.readouterr().err


def test_what_is_packed_is_read_and_what_no_modality_reads_is_named(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = ["a.mka", "b.jfif", "c.aiff", "d.caf", "e.bmp", "f.gif", "g.tif", "h.avif", "i.m4b"]
    root = tree(dict.fromkeys([*read, "j.mpg", "k.mpg", "l.ts", "m.heic", "n.txt"], b"1"))
    assert build("folder", root, tmp_path / "out") == 0
    assert "9 samples" in (told := capsys.readouterr().err)
    assert "5 other files left out (no modality reads 2 mpg, 1 ts, 1 heic, 1 txt)" in told
    (shard,) = open_shards([f"{tmp_path}/out/*.tar"], extensions=[]).shards
    packed = {part for kind in shard.header.kinds for part in kind.split("+")} - {"json"}
    assert packed == {name.partition(".")[2] for name in read}
    assert packed <= {extension for found in EXTENSIONS.values() for extension in found}
    for modality, found in EXTENSIONS.items():
        assert modality_class(modality).extensions == found


def test_members_of_double_extensions_are_not_called_good(
    tmp_path: Path, make_tar: MakeTar, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = open_shards(["builtin:image-heldout"], extensions=["jpg"]).read(0).data
    members = [("1.jpg", picture), ("1.input.jpg", b"no"), ("2.input.jpg", picture), ("3.seg.npy", b"no")]
    tar = make_tar(tmp_path / "s.tar", members)
    assert main(["shards", "check", str(tar), "--modality", "image"]) == 1
    told = capsys.readouterr().out
    assert f"{tar}: 1 samples are not read, such as 1 of '.input.jpg': a key ends at the first dot" in told
    assert "rename KEY.input.jpg to KEY.jpg" in told


def test_check_shows_how_far_it_has_come(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridle.commands.shards.REPORT_SECONDS", 0.0)
    build("folder", tree(clips(6)), tmp_path / "out", "--samples-per-shard", "3")
    capsys.readouterr()
    assert main(["shards", "check", f"{tmp_path}/out/*.tar"]) == 0
    told = capsys.readouterr().err
    assert re.search(r"^4 samples, shard 2 of 2, \d+/s, \d+ s left$", told, re.MULTILINE)
