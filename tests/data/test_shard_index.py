"""The index finds every member, and damage is named before it costs samples."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_inputs import MakeTar, write_tar

from bridle.cli import main
from bridle.data import index
from bridle.data.errors import SampleError, ShardError
from bridle.data.shards import open_shards
from bridle.data.writer import write_index

TEN = [(f"{i}.{end}", f"{end}{i}".encode() * (i + 1)) for i in range(10) for end in ("wav", "json")]


def test_every_member_is_read_at_its_offset(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [("a/b.c/x.wav", b"1"), ("a/b.c/x.json", b"{}"), ("y" * 200 + ".WAV", b"22"), ("z.left.wav", b"no")]
    shards = open_shards([str(make_tar(tmp_path / "s.tar", members))], extensions=["wav"])
    read = [shards.read(i) for i in range(len(shards))]
    assert [(sample.key, sample.data) for sample in read] == [("a/b.c/x", b"1"), ("y" * 200, b"22")]
    assert read[0].meta == {"json": b"{}"} and read[0].about == {}


def test_labels_come_from_json_or_cls(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [
        ("a.wav", b"1"),
        ("a.json", b'{"label": "dog"}'),
        ("b.wav", b"1"),
        ("b.json", b'{"labels": ["x", "y"]}'),
        ("c.wav", b"1"),
        ("c.cls", b"7\n"),
        ("d.wav", b"1"),
        ("e.wav", b"1"),
        ("e.json", b"[1]"),
    ]
    shards = open_shards([str(make_tar(tmp_path / "s.tar", members))], extensions=["wav"])
    assert [shards.read(i).labels for i in range(4)] == [["dog"], ["x", "y"], ["7"], []]
    with pytest.raises(SampleError, match=r"e\.json is not a JSON object"):
        _ = shards.read(4).labels


def test_index_stands_beside_the_shard_and_is_used_again(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    open_shards([str(tar)], extensions=["wav"])
    beside = tmp_path / "s.tar.index"
    header, *lines = beside.read_text().splitlines()
    assert json.loads(header)["samples"] == len(lines) == 10
    before = beside.stat()
    assert len(open_shards([str(tar)], extensions=["wav"])) == 10
    assert beside.stat().st_mtime_ns == before.st_mtime_ns


def test_stale_index_is_built_again(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN[:2])
    assert len(open_shards([str(tar)], extensions=["wav"])) == 1
    make_tar(tar, TEN * 1 + [("more.wav", bytes(20_000))])
    shards = open_shards([str(tar)], extensions=["wav"])
    assert [shards.read(i).data for i in range(10)] == [content for name, content in TEN if name.endswith("wav")]


def test_index_of_another_tar_of_the_same_size_is_built_again(
    tmp_path: Path, make_tar: MakeTar, caplog: pytest.LogCaptureFixture
) -> None:
    tar, beside = tmp_path / "s.tar", tmp_path / "s.tar.index"
    make_tar(tar, [("a.wav", b"1" * 400), ("m.wav", b"m" * 300), ("b.wav", b"2" * 600), ("z.wav", b"9")])
    open_shards([str(tar)], extensions=["wav"])
    size = tar.stat().st_size
    make_tar(tar, [("a.wav", b"1" * 400), ("m.wav", b"m" * 900), ("b.wav", b"2" * 100), ("z.wav", b"9")])
    assert tar.stat().st_size == size
    shards = open_shards([str(tar)], extensions=["wav"])
    assert [shards.read(i).data for i in range(4)] == [b"1" * 400, b"m" * 900, b"2" * 100, b"9"]
    assert "made for another tar" in caplog.text
    # An archive that is unpacked gives both the same second, whatever they are.
    make_tar(tar, [("a.wav", b"1" * 400), ("m.wav", b"m" * 300), ("b.wav", b"2" * 600), ("z.wav", b"9")])
    for file in (tar, beside):
        os.utime(file, (1_700_000_000, 1_700_000_000))
    shards = open_shards([str(tar)], extensions=["wav"])
    assert [shards.read(i).data for i in range(4)] == [b"1" * 400, b"m" * 300, b"2" * 600, b"9"]


def test_an_index_that_was_copied_with_its_tar_stays_as_it_is(tmp_path: Path, make_tar: MakeTar) -> None:
    header = write_index(make_tar(tmp_path / "a" / "s.tar", TEN))
    (tmp_path / "b").mkdir()
    for name in ("s.tar.index", "s.tar"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    before = (tmp_path / "b" / "s.tar.index").read_bytes()
    for _ in range(2):
        (shard,) = open_shards([str(tmp_path / "b" / "s.tar")], extensions=["wav"]).shards
        assert shard.header.sha256 == header.sha256 and shard.count == 10
    assert (tmp_path / "b" / "s.tar.index").read_bytes() == before


def test_hard_and_symbolic_links_are_samples_of_their_own(tmp_path: Path) -> None:
    tar = tmp_path / "s.tar"
    with tarfile.open(tar, "w") as writing:
        for name, kind, target in (
            ("d/h1.wav", tarfile.REGTYPE, ""),
            ("d/h2.wav", tarfile.LNKTYPE, "d/h1.wav"),
            ("d/h3.wav", tarfile.SYMTYPE, "../d/h2.wav"),
            ("d/h4.wav", tarfile.SYMTYPE, "s5.wav"),
            ("d/s5.wav", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            content = name.encode() * 300 if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            writing.addfile(member, io.BytesIO(content))
    shards = open_shards([str(tar)], extensions=["wav"])
    found = {sample.key: sample.data for sample in map(shards.read, range(len(shards)))}
    one, five = b"d/h1.wav" * 300, b"d/s5.wav" * 300
    assert found == {"d/h1": one, "d/h2": one, "d/h3": one, "d/h4": five, "d/s5": five}


@pytest.mark.parametrize("target", ["gone.wav", "/etc/passwd", "a.wav"])
def test_a_link_that_leads_out_of_the_tar_is_named(tmp_path: Path, target: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as writing:
        member = tarfile.TarInfo("a.wav")
        member.type, member.linkname = tarfile.SYMTYPE, target
        writing.addfile(member)
    with pytest.raises(ShardError, match=rf"member 'a\.wav' at offset 0 is a link to '{target}', which is no file"):
        open_shards([str(tmp_path / "s.tar")], extensions=["wav"])


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_sparse_members_are_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.wav").write_bytes(b"b" * 900)
    with (tmp_path / "a.wav").open("wb") as file:
        file.write(b"a" * 4096)
        file.truncate(1 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"z" * 4096)
    command = ["tar", f"--format={kind}", "--sparse", "-cf", "s.tar", "a.wav", "b.wav"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "s.tar").stat().st_size < 1 << 19, "tar has stored the holes"
    assert main(["shards", "check", str(tmp_path / "s.tar")]) == 1
    assert "member 'a.wav' at offset 0 is sparse" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"junk\n", b'{"version": 99, "bytes": 1, "samples": 1, "kinds": {}, "sha256": null}\n']
)
def test_index_that_is_none_is_built_again(tmp_path: Path, make_tar: MakeTar, content: bytes) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    (tmp_path / "s.tar.index").write_bytes(content)
    assert len(open_shards([str(tar)], extensions=["wav"])) == 10


def test_cut_index_is_built_again(tmp_path: Path, make_tar: MakeTar, caplog: pytest.LogCaptureFixture) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    open_shards([str(tar)], extensions=["wav"])
    beside = tmp_path / "s.tar.index"
    beside.write_bytes(beside.read_bytes()[:200])
    assert open_shards([str(tar)], extensions=["wav"]).read(9).data == TEN[18][1]
    assert "damaged; delete it, and it is built again; building it again" in caplog.text


def test_an_index_that_is_cut_during_a_run_is_refused_by_name(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    shards = open_shards([str(tar)], extensions=["wav"])
    beside = tmp_path / "s.tar.index"
    beside.write_bytes(beside.read_bytes()[:200])
    with pytest.raises(ShardError, match=r"s\.tar\.index: .* lines for 10 samples; delete it"):
        shards.read(0)


def test_index_goes_to_the_cache_where_it_cannot_stand_beside(
    tmp_path: Path, make_tar: MakeTar, own_cache: Path
) -> None:
    tar = make_tar(tmp_path / f"{'s' * 250}.tar", TEN)  # .index makes the name too long for the file system
    assert len(open_shards([str(tar)], extensions=["wav"])) == 10
    kept = list((own_cache / "indexes").glob("*.index"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert open_shards([str(tar)], extensions=["wav"]).read(3).key == "3"
    assert kept[0].stat().st_mtime_ns == before


@settings(max_examples=60)
@given(cut=st.integers(0, 10_240 - 1))
def test_truncated_tar_is_named_wherever_it_is_cut(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole = write_tar(tmp_path_factory.mktemp("whole") / "s.tar", TEN[:12])
    end = index.scan(whole)[1][-1].members["json"]
    last = -(-sum(end) // 512) * 512
    short = tmp_path_factory.mktemp("cut") / "s.tar"
    short.write_bytes(whole.read_bytes()[: min(cut, last + 1023)])
    with pytest.raises(ShardError, match=r"cut.*/s\.tar: (truncated|not a whole tar)"):
        open_shards([str(short)], extensions=["wav"])


@settings(max_examples=40)
@given(number=st.integers(0, 19), byte=st.integers(0, 511), value=st.integers(1, 255))
def test_damaged_header_never_loses_samples_in_silence(
    tmp_path_factory: pytest.TempPathFactory, number: int, byte: int, value: int
) -> None:
    tar = write_tar(tmp_path_factory.mktemp("damaged") / "s.tar", TEN)
    content = bytearray(tar.read_bytes())
    entry = index.scan(tar)[1][number // 2]
    header = entry.members[("wav", "json")[number % 2]][0] - 512
    content[header + byte] ^= value
    tar.write_bytes(content)
    try:
        shards = open_shards([str(tar)], extensions=["wav"])
    except ShardError as error:
        assert "s.tar" in str(error)
    else:  # a byte that no checksum covers
        assert len(shards) == 10


def test_truncated_tar_with_an_index_is_named(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    open_shards([str(tar)], extensions=["wav"])
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ShardError, match=r"s\.tar: (truncated|not a whole tar)"):
        open_shards([str(tar)], extensions=["wav"])


def test_duplicate_keys_are_refused(tmp_path: Path, make_tar: MakeTar) -> None:
    apart = make_tar(tmp_path / "apart.tar", [("a.wav", b"1"), ("b.wav", b"2"), ("a.json", b"{}")])
    with pytest.raises(
        ShardError, match=r"apart\.tar: member 'a\.json' at offset 2048: the key 'a' stands in two places"
    ):
        open_shards([str(apart)], extensions=["wav"])
    twice = make_tar(tmp_path / "twice.tar", [("v1.jpg", b"1"), ("v1.JPG", b"2")])
    with pytest.raises(ShardError, match="two members 'jpg' of the key 'v1'"):
        open_shards([str(twice)], extensions=["jpg"])


def test_joined_and_compressed_tars_are_refused(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    joined = tmp_path / "joined.tar"
    joined.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(ShardError, match=r"joined\.tar: more data stands behind the end"):
        open_shards([str(joined)], extensions=["wav"])
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ShardError, match=r"s\.tar\.gz: compressed; .* gunzip it first"):
        open_shards([str(packed)], extensions=["wav"])


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_members_are_never_unpickled(tmp_path: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(_Bomb())
    members = [(f"a.{end}", bomb) for end in ("wav", "pyd", "pkl", "pickle", "pth", "json", "cls")]
    shards = open_shards([str(make_tar(tmp_path / "s.tar", members))], extensions=["wav", "pyd", "pkl"])
    sample = shards.read(0)
    assert sample.data == bomb and set(sample.meta) == {"json", "cls"}
    with pytest.raises(SampleError):
        _ = sample.labels
    assert not (tmp_path / "unpickled").exists()
