"""`bridle fetch-model`: what a service's init container runs, against a real S3 server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

FILES = {"config.json": b'{"format": 1}', "model.safetensors": os.urandom(100_000)}


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment that reaches a server with the model in it."""
    server = ThreadedMotoServer(port=0)
    server.start()
    port = server.get_host_and_port()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client: Any = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    client.create_bucket(Bucket="models")
    for name, content in FILES.items():
        client.put_object(Bucket="models", Key=f"audio/{name}", Body=content)
    client.put_object(Bucket="models", Key="half/config.json", Body=FILES["config.json"])
    yield environment
    server.stop()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest as the documentation tells people to make it."""
    folder = tmp_path_factory.mktemp("model")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    shell = "sha256sum config.json model.safetensors | sha256sum"
    return subprocess.run(shell, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout.split()[0]


def fetch(s3: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridle.cli", "fetch-model", *map(str, arguments)]
    environment = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **s3}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_folder_is_fetched_checked_and_not_fetched_again(s3: dict[str, str], wanted: str, tmp_path: Path) -> None:
    target = tmp_path / "models/audio"
    done = fetch(s3, "s3://models/audio", target, "--sha256", wanted)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{target}: fetched from s3://models/audio, sha256 {wanted}\n"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES
    again = fetch({**s3, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://models/audio", target, "--sha256", wanted)
    assert (again.returncode, again.stdout) == (0, f"{target}: there already, sha256 {wanted}\n")
    (target / "model.safetensors").write_bytes(b"torn")
    assert fetch(s3, "s3://models/audio/", target, "--sha256", wanted).returncode == 0
    assert (target / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_wrong_hash_writes_nothing_and_keeps_what_was_there(s3: dict[str, str], wanted: str, tmp_path: Path) -> None:
    target = tmp_path / "audio"
    other = hashlib.sha256(b"another model").hexdigest()
    done = fetch(s3, "s3://models/audio", target, "--sha256", other)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr.splitlines() == [
        f"bridle: error: s3://models/audio: sha256 {wanted}, expected {other}; nothing was written:"
        " upload the model again, or give the sha256 of the one you mean"
    ]
    assert fetch(s3, "s3://models/audio", target, "--sha256", wanted).returncode == 0
    assert fetch(s3, "s3://models/audio", target, "--sha256", other).returncode == 2
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES


@pytest.mark.parametrize(
    ("url", "more", "environment", "code", "said"),
    [
        ("s3://models/half", [], {}, 2, "s3://models/half/model.safetensors: not found (S3 answers NoSuchKey"),
        ("s3://nowhere/audio", [], {}, 2, "s3://nowhere/audio/config.json: not found (S3 answers NoSuchBucket"),
        ("/models/audio", [], {}, 2, "/models/audio: expected the URL of a model folder, s3://… or https://…"),
        ("s3://models/audio", ["--sha256", "abc"], {}, 2, "--sha256 'abc': expected 64 hexadecimal digits"),
        ("s3://models/audio", ["--sha256", ""], {}, 2, "--sha256 '': expected 64 hexadecimal digits"),
        ("s3://models/audio", [], {"AWS_ACCESS_KEY_ID": "", "HOME": "/nonexistent"}, 2, "no S3 credentials found"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    s3: dict[str, str], tmp_path: Path, url: str, more: list[str], environment: dict[str, str], code: int, said: str
) -> None:
    done = fetch({**s3, **environment}, url, tmp_path / "audio", *more)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert done.stderr.startswith("bridle: error: ") and said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(s3: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = fetch(s3, "s3://models/audio", tmp_path / "file/audio")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1) and "file" in done.stderr, done.stderr
