"""Two nodes that share no disk, by the training manifest's own command and environment: the same run as on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from filelock import FileLock
from launching import ROOT, pretrain, rows
from manifests import K8S, KUBECTL, find, needs_kubectl, pods_of
from nodes import ADDRESSES, NAMES, Cluster, Pod, in_node, names_of, two_nodes

pytestmark = [needs_kubectl, pytest.mark.slow, pytest.mark.timeout(1500)]
SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
PORT = 9000
RECIPE = Path(__file__).with_name("two_nodes.yaml")
SETTINGS = {
    "RECIPE": str(RECIPE),
    "DEEPSPEED_CONFIG": "builtin:zero2",
    "DATA": "s3://bridle/shards/train-*.tar",
    "HELDOUT": "s3://bridle/shards/heldout-*.tar",
    "RUN": "s3://bridle/runs/tiny",
    "CACHE_GB": "1",
    "PET_NPROC_PER_NODE": "2",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "AWS_ENDPOINT_URL": f"http://s3:{PORT}",
}
"""What an overlay of one's own merges into the base's ConfigMap."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    with FileLock("/tmp/bridle-two-nodes.lock"), two_nodes(), pytest.MonkeyPatch.context() as changed:
        changed.setenv("NO_PROXY", ADDRESSES[0])
        changed.setenv("no_proxy", ADDRESSES[0])
        yield


@pytest.fixture(scope="module")
def bucket(nodes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket with the shards, on a server in node 0."""
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    server = in_node(
        0, sys.executable, "-m", "moto.server", "-H", ADDRESSES[0], "-p", str(PORT), stdout=log, stderr=log
    )
    client = boto3.resource(
        "s3", endpoint_url=f"http://{ADDRESSES[0]}:{PORT}", region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    made = eventually(lambda: client.create_bucket(Bucket="bridle"))
    for kind in ("train", "heldout"):
        for end in ("", ".index"):
            path = ROOT / f"bridle/data/sample/audio-{kind}-0000.tar{end}"
            made.put_object(Key=f"shards/{kind}-0000.tar{end}", Body=path.read_bytes())
    yield made
    server.kill()
    server.wait()


@pytest.fixture
def cluster(bucket: Any, tmp_path: Path) -> Iterator[Cluster]:
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "base/training", tmp_path)],
        "configMapGenerator": [
            {"name": "bridle-training", "namespace": "bridle", "behavior": "merge",
             "literals": [f"{key}={value}" for key, value in SETTINGS.items()]}
        ],
        "generatorOptions": {"disableNameSuffixHash": True},
    }  # fmt: skip
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    text = subprocess.run([str(KUBECTL), "kustomize", tmp_path], capture_output=True, text=True, check=True).stdout
    manifests = list(yaml.safe_load_all(text))
    [pods] = pods_of([find(manifests, "Job/bridle-train")])
    made = Cluster(pods, manifests, SECRETS, tmp_path)
    yield made
    made.end()


def test_two_nodes_without_a_shared_disk_train_as_one_and_go_on_after_pods_are_deleted_and_killed(
    cluster: Cluster, bucket: Any, tmp_path: Path
) -> None:
    names_of(1, "")
    second = cluster.start(1)
    wait_for(lambda: "waiting for node 0, bridle-train-0.bridle-train" in second.log.read_text(), cluster)
    names_of(1, NAMES)  # as when pod 0 is scheduled later
    first = cluster.start(0)
    wait_for(lambda: "[1 encoder] step 4/40" in first.log.read_text(), cluster)
    assert second.delete() == 75, cluster.logs()
    assert first.process.wait(300) == 75, cluster.logs()

    third = [cluster.start(0), cluster.start(1)]  # on empty volumes
    wait_for(lambda: "[2 tokenizer] step 4/" in third[0].log.read_text(), cluster)
    assert re.search(r"\[1 encoder\].* from step [1-9]", third[0].log.read_text()), cluster.logs()
    assert third[1].delete(grace=0.0) not in (0, 75), cluster.logs()  # no time to save anything
    assert third[0].process.wait(300) == 75, cluster.logs()

    again = [cluster.start(0), cluster.start(1)]
    assert [pod.process.wait(300) for pod in again] == [0, 0], cluster.logs()
    assert "[1 encoder]" not in again[0].log.read_text(), cluster.logs()  # what was finished is not done again

    pretrain(tmp_path / "one", "--recipe", str(RECIPE), ranks=4)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    bucket.download_file("runs/tiny/metrics.jsonl", str(fetched / "metrics.jsonl"))
    assert rows(fetched) == rows(tmp_path / "one")
    assert {"config.json", "model.safetensors"} <= {
        found.key.rpartition("/")[2] for found in bucket.objects.filter(Prefix="runs/tiny/models/final/")
    }


def eventually(call: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def wait_for(there: Callable[[], bool], cluster: Cluster, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end and all(map(alive, cluster.started[-2:])), cluster.logs()
        time.sleep(0.05)


def alive(pod: Pod) -> bool:
    return pod.process.poll() is None
