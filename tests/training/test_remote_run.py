"""A run folder on S3, against moto's real server: each node has its own cache, and none of them is needed again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from halting import Halt
from launching import BRIDLE, ROOT, TIMES, TINY, command, environment, pretrain, rows
from moto.server import ThreadedMotoServer
from warm import WarmProcess, run_warm

from bridle.config import load_recipe
from bridle.model_folder import load
from bridle.training.manifest import check_folder
from bridle.training.origin import begin_from

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
ENDPOINT = "http://127.0.0.1:{}"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture(scope="module")
def bucket(port: int) -> Any:
    client = {"endpoint_url": ENDPOINT.format(port), "region_name": KEYS["AWS_DEFAULT_REGION"]}
    s3 = boto3.resource("s3", aws_access_key_id="test", aws_secret_access_key="test", **client)
    return s3.create_bucket(Bucket="runs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(run)
    return run


class Node:
    """A machine with nothing on its disk, and a run that it trains."""

    def __init__(self, disk: Path, port: int, run: str, *arguments: str, ranks: int = 1, halt: str = "") -> None:
        """halt: where its first rank waits for the test, see halting.py."""
        disk.mkdir()
        self.halt = Halt(halt, disk / "halt")
        self.log = disk / "log"
        self.variables = environment(
            **KEYS, AWS_ENDPOINT_URL=ENDPOINT.format(port), XDG_CACHE_HOME=str(disk / "cache"), TMPDIR=str(disk)
        )
        with self.log.open("w") as output:
            make = WarmProcess if ranks == 1 else subprocess.Popen
            words, variables = command(run, *arguments, ranks=ranks), self.variables
            if halt:
                words, variables = self.halt.put_in(words, variables)
            self.process = make(words, env=variables, cwd=ROOT, stdout=output, stderr=output)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 400
        while not what():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def ended(self) -> int:
        return self.process.wait(timeout=400)

    def bridle(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_warm([sys.executable, BRIDLE, *arguments], env=self.variables, cwd=ROOT)


def eventually(what: Callable[[], object], node: Node) -> None:
    """Also when the node's first process has ended before its others."""
    deadline = time.monotonic() + 400
    while not what():
        assert time.monotonic() < deadline, node.output
        time.sleep(0.1)


def keys(bucket: Any, prefix: str) -> set[str]:
    return {found.key.removeprefix(f"{prefix}/") for found in bucket.objects.filter(Prefix=f"{prefix}/")}


def content(bucket: Any, key: str) -> bytes:
    return bucket.Object(key).get()["Body"].read()


def rows_in(bucket: Any, prefix: str) -> list[dict]:
    lines = [json.loads(line) for line in content(bucket, f"{prefix}/metrics.jsonl").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.slow
def test_a_run_goes_from_node_to_node_and_ends_as_an_undisturbed_one(bucket, port, undisturbed, tmp_path, monkeypatch):
    run, at = "s3://runs/some/tiny", "some/tiny"
    first = Node(tmp_path / "first", port, run, ranks=2, halt="[1 encoder] the end of step 6")
    first.wait_for(lambda: "checkpoints/phase-1-encoder/step-00000004/manifest.json" in keys(bucket, at))
    first.process.send_signal(signal.SIGTERM)  # it ends DeepSpeed's runner; the ranks notice, save, upload and end
    eventually(lambda: "stopping after this step" in first.output, first)
    first.halt.end()
    eventually(lambda: "lock.json" not in keys(bucket, at), first)
    assert "stopped by" in first.output

    torn = "checkpoints/phase-1-encoder/step-00000002/model.safetensors"  # as a node leaves it that dies in an upload
    bucket.put_object(Key=f"{at}/{torn}", Body=b"half")
    second = Node(tmp_path / "second", port, run, halt="[2 tokenizer] the end of step 6")
    second.wait_for(lambda: any(key.startswith("checkpoints/phase-2-tokenizer/step-") for key in keys(bucket, at)))
    second.process.kill()
    second.ended()

    third = Node(tmp_path / "third", port, run)
    assert third.ended() == 0, third.output
    assert f"done: {run}/models/final" in third.output
    for ours, theirs in zip(rows_in(bucket, at), rows(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)  # two ranks began it
    found = keys(bucket, at)
    assert {"recipe.yaml", "metrics.jsonl", "models/final/config.json", "models/iteration-1/config.json"} <= found
    units = {key.rpartition("/")[0] for key in found if key.startswith("checkpoints/")}
    assert all(f"{unit}/manifest.json" in found for unit in units)
    assert not [key for key in found if "/." in key or key.startswith(".")]

    fourth = Node(tmp_path / "fourth", port, run)
    assert fourth.ended() == 0, fourth.output
    assert "from step" not in fourth.output
    assert not list((tmp_path / "fourth").rglob("*.partial"))

    model = tmp_path / "model"
    exported = fourth.bridle("export", run, str(model))
    assert exported.returncode == 0, exported.stderr
    assert load(model).sha256 == load(next((tmp_path / "third").rglob("models/final"))).sha256
    assert fourth.bridle("report", run).stdout.strip() == f"{run}/report.html"
    assert b"<html" in content(bucket, f"{at}/report.html")
    assert fourth.bridle("status", run).returncode == 3
    assert fourth.bridle("status", "s3://runs/none").returncode == 2
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": ENDPOINT.format(port)}.items():
        monkeypatch.setenv(name, value)
    begin_from(f"{run}:1", tmp_path / "another", load_recipe(str(TINY)))
    check_folder(tmp_path / "another/checkpoints/phase-1-encoder/finished")
    missing = fourth.bridle("export", "s3://runs/none", str(model))
    assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1)
    assert "s3://runs/none: no run there" in missing.stderr


@pytest.mark.slow
def test_a_second_start_says_who_trains_there(bucket, port, tmp_path):
    run = "s3://runs/held"
    first = Node(tmp_path / "first", port, run, "phases.1.steps=100000")
    first.wait_for(lambda: "lock.json" in keys(bucket, "held"))
    second = Node(tmp_path / "second", port, run, "phases.1.steps=100000")
    assert second.ended() == 2, second.output
    assert f"{run} is in use" in second.output
    first.process.send_signal(signal.SIGTERM)
    assert first.ended() == 75, first.output
    assert "lock.json" not in keys(bucket, "held")


@pytest.mark.slow
def test_one_rank_killed_and_moved_at_any_upload_repeats_to_the_last_digit(bucket, port, undisturbed, tmp_path):
    run, at = "s3://runs/moved", "moved"
    moments = (
        ("phase-1-encoder/step-00000008/model", "[1 encoder] the end of step 10"),
        ("phase-2-tokenizer/finished/state", "[3 encoder] the end of step 2"),
    )
    for number, (seen, there) in enumerate(moments):
        node = Node(tmp_path / f"{number}", port, run, halt=there)  # so that it is not gone before it is seen
        node.wait_for(lambda seen=seen: any(seen in key for key in keys(bucket, at)))
        node.process.kill()
        node.ended()
    last = Node(tmp_path / "last", port, run)
    assert last.ended() == 0, last.output
    assert rows_in(bucket, at) == rows(undisturbed)
    weights = "models/final/model.safetensors"
    assert content(bucket, f"{at}/{weights}") == (undisturbed / weights).read_bytes()


@pytest.mark.slow
def test_training_goes_on_while_the_store_is_away_and_makes_up_for_it(undisturbed, tmp_path):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    port = server.get_host_and_port()[1]
    s3 = boto3.resource(
        "s3", endpoint_url=ENDPOINT.format(port), region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    bucket = s3.create_bucket(Bucket="away")
    node = Node(tmp_path / "node", port, "s3://away/run", halt="[1 encoder] the end of step 1")
    node.wait_for(node.halt.reached)
    server.stop()
    node.halt.end()
    node.wait_for(lambda: "the next checkpoint tries again" in node.output)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    try:
        assert node.ended() == 0, node.output
        assert rows_in(bucket, "run") == rows(undisturbed)
        assert "models/final/config.json" in keys(bucket, "run")
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("run", "changed", "said"),
    [
        ("s3://no-such-bucket/run", {}, "no-such-bucket/run/lock.json: not found"),
        ("s3://runs/run", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no S3 credentials found"),
        ("s3://", {}, "expected s3://BUCKET/PREFIX"),
        ("s4://runs/run", {}, "s4"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_and_exit_code_2(run, changed, said, bucket, port, tmp_path):
    variables = environment(**KEYS | {"AWS_ENDPOINT_URL": ENDPOINT.format(port), "HOME": str(tmp_path)} | changed)
    variables |= {"AWS_EC2_METADATA_DISABLED": "true"}
    done = run_warm(
        command(run), env={key: value for key, value in variables.items() if value or key not in KEYS}, cwd=ROOT
    )
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr
