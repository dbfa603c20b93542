"""What goes wrong in a cluster, in a pod's own command and environment: one clear line, and the exit code to act on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from launching import TINY, free_port
from manifests import environment_of, expanded, find, needs_kubectl, pods_of, rendered
from moto.server import ThreadedMotoServer

pytestmark = needs_kubectl
FAILS_AT_ONCE = 2
"""podFailurePolicy: FailJob."""
COUNTS = 1
"""Another try, up to backoffLimit."""
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="bridle")
    yield url
    server.stop()


def run_pod(folder: str, name: str, changes: dict[str, str], tmp_path: Path, before: str = "") -> tuple[int, str]:
    """A pod's exit code and log: its container's command with its environment, changed as an overlay would.

    before: shell commands in a mount namespace of its own, which make volumes.
    """
    manifests = rendered(folder)
    [pods] = pods_of([find(manifests, name)])
    [container] = pods.spec["containers"]
    values = {key: value for key, value in environment_of(container, manifests).items() if value is not None}
    environment = {
        **values, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PET_NODE_RANK": "0",
        "AWS_EC2_METADATA_DISABLED": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "PET_MASTER_PORT": str(free_port()), **changes,
    }  # fmt: skip
    command = [*container["command"], *expanded(container.get("args", []), dict(environment))]
    command = [word.replace("train.prometheus_port=9464", "train.prometheus_port=0") for word in command]
    if before:
        command = ["unshare", "--mount", "sh", "-ec", f'{before}\nexec "$@"', "sh", *command]
    environment["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


ONE_RANK = {
    "PET_NNODES": "1", "RECIPE": str(TINY), "DATA": "builtin:audio", "HELDOUT": "builtin:audio-heldout",
    "DEEPSPEED_CONFIG": "builtin:zero2", "PET_MASTER_ADDR": "127.0.0.1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"RECIPE": "audoi"}, FAILS_AT_ONCE, "audoi"),
        (
            {"DATA": "s3://bridle/shards/train-*.tar"},
            FAILS_AT_ONCE,
            "credentials found (Unable to locate credentials); set AWS_ACCESS_KEY_ID",
        ),
        ({"DATA": "s3://birdle/shards/train-0.tar", **KEYS}, FAILS_AT_ONCE, "S3 answers NoSuchBucket"),
        ({"DATA": "s3://bridle/shards/trian-*.tar", **KEYS}, FAILS_AT_ONCE, "trian-*.tar': matches nothing"),
    ],
    ids=["recipe", "secret", "bucket", "prefix"],
)
def test_a_training_pod_with_wrong_settings(
    changes: dict[str, str], code: int, said: str, endpoint: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    found = run_pod(
        "base/training",
        "Job/bridle-train",
        {**ONE_RANK, "RUN": str(run), "AWS_ENDPOINT_URL": endpoint, **changes},
        tmp_path,
    )
    assert_one_line(found, code, said)
    assert not (run / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("options", "said"), [("ro", "the file system is read-only"), ("size=64k", "the disk is full")], ids=["ro", "full"]
)
def test_a_training_pod_whose_volume_cannot_be_written(options: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    before = f"mount -t tmpfs -o {options} volume {tmp_path}/runs"
    if subprocess.run(["unshare", "--mount", "sh", "-c", before], capture_output=True, check=False).returncode:
        pytest.skip("NO MOUNT NAMESPACES: A READ-ONLY AND A FULL VOLUME ARE NOT TESTED; needs root")
    changes = {**ONE_RANK, "RUN": f"{tmp_path}/runs/tiny"}
    assert_one_line(run_pod("base/training", "Job/bridle-train", changes, tmp_path, before), COUNTS, said)


def test_a_service_pod_without_its_secret(tmp_path: Path) -> None:
    changes = {"BRIDLE_API_KEYS_FILE": str(tmp_path / "keys"), "BRIDLE_PORT": "0"}
    found = run_pod("overlays/kind-cpu/serving", "Deployment/bridle-serve", changes, tmp_path)
    assert_one_line(found, COUNTS, f"No such file or directory: '{tmp_path}/keys'")


def assert_one_line(found: tuple[int, str], code: int, said: str) -> None:
    assert "Traceback" not in found[1]
    lines = [line for line in found[1].splitlines() if "error:" in line]
    assert (found[0], len(lines)) == (code, 1) and said in lines[0], found
