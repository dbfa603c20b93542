"""Two nodes in miniature: network namespaces joined by a bridge, a mount namespace of its own for each pod.

What a kubelet does for a pod of a manifest is done here for the same manifest: its command and environment, names that
resolve, volumes, a read-only root, SIGTERM to its first process and SIGKILL after the grace period.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from manifests import ROOT, Manifest, Pods, environment_of, expanded

NODES = ("bridle-node-0", "bridle-node-1")
ADDRESSES = ("10.73.0.2", "10.73.0.3")
HOST = "10.73.0.1"
NAMES = f"{ADDRESSES[0]} bridle-train-0.bridle-train s3\n{ADDRESSES[1]} bridle-train-1\n"
SWITCH = "bridle-switch"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[None]:
    """Makes the namespaces, each with ``eth0`` and names for both; skips, loudly, where that is forbidden."""
    attempt = "ip link add bridle-try type bridge && ip link del bridle-try && unshare --net --mount true"
    allowed = subprocess.run(attempt, shell=True, capture_output=True, text=True, check=False)
    if allowed.returncode or os.geteuid():
        pytest.skip(
            f"NO NETWORK NAMESPACES: TWO NODES ARE NOT TESTED; needs root and iproute2 ({allowed.stderr.strip()})"
        )
    try:
        make()
        yield
    finally:
        gone()


def names_of(number: int, names: str) -> None:
    """What the names of a node's pods resolve to; also of pods that run."""
    hosts = Path(f"/etc/netns/{NODES[number]}/hosts")
    hosts.parent.mkdir(parents=True, exist_ok=True)
    with hosts.open("w") as file:  # the same file: pods have it mounted
        file.write(f"127.0.0.1 localhost\n{names}")


def make() -> None:
    gone()
    ip("link", "add", SWITCH, "type", "bridge")
    ip("addr", "add", f"{HOST}/24", "dev", SWITCH)
    ip("link", "set", SWITCH, "up")
    for number, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
        ip("netns", "add", node)
        ip("link", "add", f"bridle-veth{number}", "type", "veth", "peer", "name", "eth0", "netns", node)
        ip("link", "set", f"bridle-veth{number}", "master", SWITCH, "up")
        ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", node, "link", "set", "eth0", "up")
        ip("-n", node, "link", "set", "lo", "up")
        names_of(number, NAMES)


def gone() -> None:
    """Removes whatever a killed test left, too."""
    for number, node in enumerate(NODES):
        left = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=False).stdout
        for process in left.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"bridle-veth{number}"], capture_output=True, check=False)
        for path in (Path(f"/etc/netns/{node}/hosts"), Path(f"/etc/netns/{node}")):
            with contextlib.suppress(OSError):
                path.unlink() if path.is_file() else path.rmdir()
    subprocess.run(["ip", "link", "del", SWITCH], capture_output=True, check=False)


def in_node(number: int, *command: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(["ip", "netns", "exec", NODES[number], *command], text=True, **more)


@dataclass
class Pod:
    """A started pod of an Indexed Job."""

    index: int
    process: subprocess.Popen[str]
    log: Path
    grace: float

    def first(self) -> int:
        """Its first process, as the node sees it: what a kubelet signals."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def delete(self, grace: float | None = None) -> int:
        """What `kubectl delete pod [--grace-period]` does; the exit code."""
        seconds = self.grace if grace is None else grace
        try:
            if seconds:  # else a busy machine may give it some
                os.kill(self.first(), signal.SIGTERM)
                return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        os.kill(self.first(), signal.SIGKILL)
        return self.process.wait(300)


@dataclass
class Cluster:
    """Starts pods of one Job, index i on node i, each with new volumes."""

    pods: Pods
    manifests: list[Manifest]
    secrets: dict[str, str]
    folder: Path
    started: list[Pod] = field(default_factory=list)

    def start(self, index: int) -> Pod:
        [container] = self.pods.spec["containers"]
        values = environment_of(container, self.manifests)
        by_field = {
            entry["name"]: str(index) for entry in container["env"]
            if entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") == INDEX
        }  # fmt: skip
        environment = {key: value for key, value in values.items() if value is not None} | self.secrets | by_field
        log = self.folder / f"pod-{index}-{len(self.started)}.log"
        with log.open("w") as out:
            process = in_node(
                index, "unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, "-c", ENTER,
                str(ROOT), *mounts(container), "--", *container["command"],
                *expanded(container["args"], dict(environment)),
                env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **environment},
                stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        pod = Pod(index, process, log, float(self.pods.spec["terminationGracePeriodSeconds"]))
        self.started.append(pod)
        return pod

    def logs(self) -> str:
        return "\n".join(f"== {pod.log.name}\n{pod.log.read_text()}" for pod in self.started)

    def end(self) -> None:
        for pod in self.started:
            pod.process.kill()
            pod.process.wait()


def mounts(container: Manifest) -> list[str]:
    return [mount["mountPath"] for mount in container["volumeMounts"]]


ENTER = """
import os, subprocess, sys
cut = sys.argv.index("--")
def mount(*words, **more):
    subprocess.run(["mount", *words], check=True, **more)
kept = {path: os.open(path, os.O_PATH) for path in (sys.argv[1], sys.prefix)}
mount("--make-rprivate", "/")
mount("-t", "proc", "proc", "/proc")
for path in sys.argv[2:cut]:
    there = path
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    mount("-t", "tmpfs", "volume", there)
    os.makedirs(path, exist_ok=True)
    if there != path:
        mount("-t", "tmpfs", "volume", path)
for path, held in kept.items():
    if not os.path.exists(path):  # a volume, such as /tmp, lies over the checkout
        os.makedirs(path)
        mount("--no-canonicalize", "--bind", f"/proc/self/fd/{held}", path, pass_fds=[held])
        mount("-o", "remount,bind,ro", path)
    os.close(held)
mount("-o", "remount,bind,ro", "/")
os.chdir("/tmp")
os.execvp(sys.argv[cut + 1], sys.argv[cut + 1:])
"""
"""An own, empty file system for each volume, and everything else read-only; then the command takes this place."""
