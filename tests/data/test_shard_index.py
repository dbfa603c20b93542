"""The index finds every member, and damage is named before it costs samples."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_inputs import MakeTar, write_tar

from bridle.data import index
from bridle.data.errors import SampleError, ShardError
from bridle.data.shards import open_shards

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


def test_index_of_another_tar_of_the_same_size_is_refused(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", [("a.wav", b"1" * 400), ("b.wav", b"2" * 600)])
    open_shards([str(tar)], extensions=["wav"])
    size = tar.stat().st_size
    make_tar(tar, [("a.wav", b"1" * 600), ("b.wav", b"2" * 400)])
    assert tar.stat().st_size == size
    with pytest.raises(ShardError, match=r"s\.tar\.index: it does not fit the tar; delete it"):
        open_shards([str(tar)], extensions=["wav"]).read(0)


@pytest.mark.parametrize(
    "content", [b"", b"junk\n", b'{"version": 99, "bytes": 1, "samples": 1, "kinds": {}, "sha256": null}\n']
)
def test_index_that_is_none_is_built_again(tmp_path: Path, make_tar: MakeTar, content: bytes) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    (tmp_path / "s.tar.index").write_bytes(content)
    assert len(open_shards([str(tar)], extensions=["wav"])) == 10


def test_cut_index_is_refused_by_name(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", TEN)
    open_shards([str(tar)], extensions=["wav"])
    beside = tmp_path / "s.tar.index"
    beside.write_bytes(beside.read_bytes()[:200])
    with pytest.raises(ShardError, match=r"s\.tar\.index: .* lines for 10 samples; delete it"):
        open_shards([str(tar)], extensions=["wav"]).read(0)


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
