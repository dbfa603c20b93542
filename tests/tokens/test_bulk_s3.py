"""Bulk tokenization into a bucket, against moto's real server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from bridle.cli import main
from bridle.tokens.corpus import Corpus

pytest.importorskip("s3fs")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield boto3.resource("s3").create_bucket(Bucket="codes")
    server.stop()


def test_a_bucket_gets_the_files_of_a_folder_and_a_second_run_does_only_what_is_missing(
    bucket: Any, models: dict[str, Path], sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenize", str(models["audio"]), *map(str, sounds), "--workers", "0", "--out"]
    assert main([*command, str(tmp_path / "local")]) == 0
    assert main([*command, "s3://codes/some/where"]) == 0
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "local/data").iterdir()
    }

    def found() -> dict[str, str]:
        objects = bucket.objects.filter(Prefix="some/where/data/")
        return {o.key.rsplit("/", 1)[1]: hashlib.sha256(o.get()["Body"].read()).hexdigest() for o in objects}

    assert found() == expected
    local = (tmp_path / "local" / "manifest.json").read_bytes()
    assert bucket.Object("some/where/manifest.json").get()["Body"].read() == local
    assert len(list(Corpus("s3://codes/some/where"))) == 12
    kept, lost = sorted(f"some/where/data/{name}" for name in expected)[:2]
    before = bucket.Object(kept).last_modified
    bucket.Object(lost).delete()
    assert main([*command, "s3://codes/some/where"]) == 0
    assert found() == expected
    assert bucket.Object(kept).last_modified == before
    assert main([*command, "s3://codes/some/where", "--verify"]) == 0
    assert not list(bucket.objects.filter(Prefix="some/where/claims/"))
    capsys.readouterr()
    assert main([*command, "s3://nobody/codes"]) == 1
    error = capsys.readouterr().err
    assert "s3://nobody/codes" in error
    assert "Traceback" not in error
