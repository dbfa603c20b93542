"""Shards on S3, against moto's real server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from shard_inputs import MakeTar

from bridle.data.errors import ShardError
from bridle.data.shards import open_shards
from bridle.data.writer import write_index
from bridle.remote import access

MEMBERS = [(f"k{i}.num", str(i).encode() * 2000) for i in range(5)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(access, "FIRST_WAIT_SECONDS", 0.001)
    made = boto3.resource("s3").create_bucket(Bucket="shards")
    yield made
    made.objects.delete()
    made.delete()


def put(bucket: Any, path: Path, key: str) -> None:
    bucket.put_object(Key=key, Body=path.read_bytes())


def test_s3_shards_are_found_by_glob_and_read(bucket: Any, tmp_path: Path, make_tar: MakeTar) -> None:
    for name in ("train/0.tar", "train/1.tar", "other/0.tar"):
        put(bucket, make_tar(tmp_path / name, MEMBERS), name)
    write_index(tmp_path / "train/0.tar")
    put(bucket, tmp_path / "train/0.tar.index", "train/0.tar.index")
    shards = open_shards(["s3://shards/train/*.tar"], extensions=["num"])
    assert [shard.url for shard in shards.shards] == ["s3://shards/train/0.tar", "s3://shards/train/1.tar"]
    assert [shards.read(i).data for i in range(10)] == [content for _, content in MEMBERS * 2]


def test_a_truncated_s3_object_is_refused(bucket: Any, tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", MEMBERS)
    bucket.put_object(Key="cut.tar", Body=tar.read_bytes()[:7000])
    with pytest.raises(ShardError, match=r"^s3://shards/cut\.tar: (truncated|not a whole tar)"):
        open_shards(["s3://shards/cut.tar"], extensions=["num"])
    write_index(tar)
    put(bucket, tmp_path / "s.tar.index", "cut.tar.index")
    shards = open_shards(["s3://shards/cut.tar"], extensions=["num"])
    with pytest.raises(ShardError, match=r"^s3://shards/cut\.tar: 7000 bytes, but its index says 20480; upload"):
        shards.read(0)


def test_an_s3_object_replaced_since_it_was_indexed_is_indexed_again(
    bucket: Any, tmp_path: Path, make_tar: MakeTar
) -> None:
    put(bucket, make_tar(tmp_path / "s.tar", MEMBERS), "s.tar")
    assert len(open_shards(["s3://shards/s.tar"], extensions=["num"])) == 5
    put(bucket, make_tar(tmp_path / "s.tar", MEMBERS * 1 + [("z.num", bytes(30_000))]), "s.tar")
    assert open_shards(["s3://shards/s.tar"], extensions=["num"]).read(5).data == bytes(30_000)


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("s3://shards/none.tar", r"^s3://shards/none\.tar: not found .*; check bucket, prefix or key"),
        ("s3://nowhere/s.tar", r"^s3://nowhere/s\.tar: not found \(.*bucket does not exist"),
        ("s3://shards/none-*.tar", "matches nothing"),
        ("s3://shards", r"expected s3://BUCKET/KEY\.tar"),
    ],
)
def test_s3_names_that_lead_nowhere_are_refused(bucket: Any, pattern: str, match: str) -> None:
    with pytest.raises(ShardError, match=match):
        open_shards([pattern], extensions=["num"])


def test_an_s3_server_out_of_reach_is_an_error_until_its_address_is_put_right(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_tar: MakeTar
) -> None:
    put(bucket, make_tar(tmp_path / "s.tar", MEMBERS), "s.tar")
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(ShardError, match=r"5 tries failed, the last: .*; check the network"):
            open_shards(["s3://shards/s.tar"], extensions=["num"])
    assert len(open_shards(["s3://shards/s.tar"], extensions=["num"])) == 5


def test_s3_without_credentials_says_so(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as changed:
        changed.delenv("AWS_ACCESS_KEY_ID")
        changed.delenv("AWS_SECRET_ACCESS_KEY")
        changed.setenv("AWS_EC2_METADATA_DISABLED", "true")
        changed.setenv("HOME", str(tmp_path))
        with pytest.raises(ShardError, match=r"no S3 credentials found \(.*\); set AWS_ACCESS_KEY_ID"):
            open_shards(["s3://shards/s.tar"], extensions=["num"])


def test_s3_without_s3fs_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    S3FileSystem.clear_instance_cache()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ShardError, match=r"pip install 'bridle\[s3\]'"):
        open_shards(["s3://shards/s.tar"], extensions=["num"])
