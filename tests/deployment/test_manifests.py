"""The manifests of k8s/: every kustomization renders, fits its schemas strictly, and keeps what no schema knows of."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import manifest_lint
import pytest
from manifests import ROOT, Manifest, environment_of, expanded, find, kustomizations, needs_kubectl, pods_of, rendered

from bridle.cli import COMMANDS
from bridle.config import load_recipe
from bridle.pretrain import overrides, parse
from bridle.training.engine import read_ds_config, resolve_ds_config, split_batch
from bridle.training.metrics import PrometheusMetrics
from serving.metrics import Metrics
from serving.settings import read_settings

pytestmark = needs_kubectl
KUBERNETES = ("1.31", "1.35")
"""The oldest that the manifests are for, and a new one."""
OVERLAYS = [name for name in kustomizations() if name.startswith("overlays/")]
LIBRARIES = {
    "AWS_DEFAULT_REGION": "botocore/configprovider.py",
    "DS_ACCELERATOR": "deepspeed/accelerator/real_accelerator.py",
    "GLOO_SOCKET_IFNAME": "torch/lib/libtorch_cpu.so",
    "NCCL_SOCKET_IFNAME": "nvidia/nccl/lib/libnccl.so.2",
    "NCCL_IB_HCA": "nvidia/nccl/lib/libnccl.so.2",
    "HOME": "asyncio/../posixpath.py",
}
"""Variables that a library reads, and the file of it that does."""
LAUNCH = "bridle/commands/launch.py"


@pytest.mark.parametrize("folder", kustomizations())
def test_every_kustomization_fits_its_schemas_strictly(folder: str) -> None:
    for manifest in rendered(folder):
        validate(manifest)


def validate(manifest: Manifest) -> None:
    """Raises on a field that is unknown, missing or of a wrong type."""
    kind, group = manifest["kind"], manifest["apiVersion"].partition("/")[0]
    # Not imported above: whoever collects the tests, to run others, would spend five seconds on it.
    if group == "monitoring.coreos.com":
        from cloudcoil.models.prometheus_operator import v1 as monitoring

        model = getattr(monitoring, kind).model_validate(manifest)
        assert_nothing_lost(manifest, model.model_dump(mode="json", by_alias=True, exclude_unset=True))
    elif group in ("trainer.kubeflow.org", "jobset.x-k8s.io"):
        from kubeflow_trainer_api import models as trainer

        prefix = "TrainerV1alpha1" if group.startswith("trainer") else "JobsetV1alpha2"
        assert_nothing_lost(manifest, getattr(trainer, prefix + kind).from_dict(manifest).to_dict())
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


def assert_nothing_lost(given: Any, taken: Any, path: str = "") -> None:
    """These models drop what they do not know."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert isinstance(taken, dict) and key in taken, f"{path}.{key} is unknown"
            assert_nothing_lost(value, taken[key], f"{path}.{key}")
    elif isinstance(given, list):
        for index, (one, other) in enumerate(zip(given, taken, strict=True)):
            assert_nothing_lost(one, other, f"{path}.{index}")


@pytest.mark.parametrize("folder", kustomizations())
def test_names_meet_limits_hold_and_pods_are_restricted(folder: str) -> None:
    assert manifest_lint.lint(rendered(folder)) == []


@pytest.mark.parametrize("folder", kustomizations())
def test_something_reads_every_variable(folder: str) -> None:
    assert list(manifest_lint.variables_are_read(rendered(folder), in_code)) == []


@functools.cache
def in_code(name: str) -> bool:
    if name in LIBRARIES:
        package, _, file = LIBRARIES[name].partition("/")
        places = importlib.util.find_spec(package).submodule_search_locations  # type: ignore[union-attr]
        return any(name.encode() in path.read_bytes() for place in places if (path := Path(place) / file).exists())
    word = re.compile(rf"\b{name}\b")
    named = any(word.search(path.read_text()) for room in ("bridle", "serving") for path in (ROOT / room).rglob("*.py"))
    return named or (name.startswith("PET_") and f'"{name[4:].lower()}"' in (ROOT / LAUNCH).read_text())


Change = Callable[[Manifest], Any]


def pod(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]["template"]["spec"]
    return spec


def main(manifest: Manifest) -> Manifest:
    container: Manifest = pod(manifest)["containers"][0]
    return container


def rules(job: Manifest) -> list[Manifest]:
    found: list[Manifest] = job["spec"]["podFailurePolicy"]["rules"]
    return found


JOB, SERVE = "Job/bridle-train", "Deployment/bridle-serve"
FAULTS: list[tuple[str, Change, str]] = [
    ("Service/bridle-serve", lambda m: m["spec"]["selector"].update(a="b"), "selects no pods"),
    ("Service/bridle-serve", lambda m: m["spec"]["ports"][0].update(targetPort="web"), "serve: port web is none"),
    ("PodDisruptionBudget/bridle-serve", lambda m: m["spec"]["selector"]["matchLabels"].update(a="b"), "selects no"),
    ("NetworkPolicy/bridle-serve", lambda m: m["spec"]["ingress"][0]["ports"][0].update(port="web"), "port web is"),
    ("ServiceMonitor/bridle-serve", lambda m: m["spec"]["endpoints"][0].update(port="web"), "port web is not one"),
    ("PodMonitor/bridle-train", lambda m: m["spec"]["podMetricsEndpoints"][0].update(port="web"), "train: port web"),
    ("HorizontalPodAutoscaler/bridle-serve", lambda m: m["spec"]["scaleTargetRef"].update(name="x"), "scales x"),
    ("ConfigMap/bridle-serving", lambda m: m["data"].update(BRIDLE_PORT="80"), "BRIDLE_PORT is not"),
    (SERVE, lambda m: m["spec"]["template"]["metadata"]["labels"].clear(), "its selector is not"),
    (SERVE, lambda m: main(m)["readinessProbe"]["httpGet"].update(path="/livez"), "readinessProbe asks /livez"),
    (SERVE, lambda m: main(m)["livenessProbe"]["httpGet"].update(port="web"), "livenessProbe asks /livez of port web"),
    (SERVE, lambda m: main(m).pop("lifecycle"), "too short for 0"),
    (SERVE, lambda m: pod(m).update(terminationGracePeriodSeconds=60), "too short for 5"),
    (JOB, lambda m: pod(m)["volumes"].pop(), "mounted but not there"),
    (JOB, lambda m: main(m)["volumeMounts"].pop(), "there but not mounted"),
    (JOB, lambda m: main(m)["envFrom"][0]["configMapRef"].update(name="x"), "names ConfigMap/x"),
    (JOB, lambda m: pod(m).update(priorityClassName="x"), "names PriorityClass/x"),
    (JOB, lambda m: pod(m)["volumes"][0]["emptyDir"].pop("sizeLimit"), "no sizeLimit"),
    (JOB, lambda m: pod(m)["volumes"][0]["emptyDir"].update(sizeLimit="600Gi"), "could take all"),
    (JOB, lambda m: main(m)["resources"]["limits"].update({"ephemeral-storage": "600Gi"}), "which evicts it"),
    (JOB, lambda m: main(m)["resources"]["requests"].update({"nvidia.com/gpu": "4"}), "nvidia.com/gpu: requests and"),
    (JOB, lambda m: main(m)["resources"]["requests"].update(memory="6 GB"), "'6 GB' is no quantity"),
    (JOB, lambda m: main(m)["resources"]["requests"].update(memory="1Ti"), "requests more memory than its limit"),
    (JOB, lambda m: pod(m)["securityContext"].pop("runAsNonRoot"), "may run as root"),
    (JOB, lambda m: main(m)["securityContext"].update(readOnlyRootFilesystem=False), "expected securityContext"),
    (JOB, lambda m: pod(m).pop("enableServiceLinks"), "gets service links"),
    (JOB, lambda m: pod(m).update(terminationGracePeriodSeconds=120), "shorter than a stop"),
    (JOB, lambda m: pod(m).update(restartPolicy="OnFailure"), "needs restartPolicy Never"),
    (JOB, lambda m: m["spec"].update(parallelism=1), "not all pods run at once"),
    (JOB, lambda m: rules(m).pop(0), "exit code 2 does not"),
    (JOB, lambda m: rules(m).pop(1), "exit code 75"),
    (JOB, lambda m: rules(m).pop(2), "a disruption counts"),
    (JOB, lambda m: rules(m)[0]["onExitCodes"].update(containerName="x"), "names a container that is not"),
    (JOB, lambda m: m["spec"].update(backoffLimit=3), "backoffLimit is below"),
    (JOB, lambda m: m["spec"].update(backoffLimitPerIndex=3), "cannot fail one by one"),
]
"""Each rule of the linter, broken once: where, how, and what it says."""


@pytest.mark.parametrize(("name", "change", "said"), FAULTS, ids=[fault[2] for fault in FAULTS])
def test_the_linter_sees_each_fault(name: str, change: Change, said: str) -> None:
    manifests = rendered("overlays/gpu-multi-node")
    change(find(manifests, name))
    assert any(said in line for line in manifest_lint.lint(manifests)), manifest_lint.lint(manifests)


def test_the_linter_sees_a_variable_that_nothing_reads_and_one_that_is_not_there() -> None:
    manifests = rendered("overlays/gpu-multi-node")
    find(manifests, "ConfigMap/bridle-serving")["data"]["BRIDLE_MAX_BACTH"] = "8"
    find(manifests, "ConfigMap/bridle-training")["data"]["DATTA"] = "s3://x"
    del find(manifests, "ConfigMap/bridle-training")["data"]["RECIPE"]
    said = {fault for _, fault in manifest_lint.variables_are_read(manifests, in_code)}
    assert said == {"nothing reads BRIDLE_MAX_BACTH", "nothing reads DATTA", "$(RECIPE) is not defined"}


TYPED = {
    "gpu-multi-node": ("Job", "PodMonitor", "Deployment"),
    "jobset": ("JobSet",),
    "trainjob": ("TrainJob", "TrainingRuntime"),
}


@pytest.mark.parametrize(("overlay", "kind"), [(overlay, kind) for overlay, kinds in TYPED.items() for kind in kinds])
def test_a_typo_in_a_manifest_is_seen_by_the_schemas(overlay: str, kind: str) -> None:
    manifest = next(each for each in rendered(f"overlays/{overlay}") if each["kind"] == kind)
    validate(manifest)
    manifest["spec"]["parallelizm"] = 2
    with pytest.raises(Exception, match="parallelizm"):
        validate(manifest)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_a_run_starts_with_what_its_manifest_says(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments parse, the recipe and DeepSpeed's configuration are there, and the batch divides over all ranks."""
    manifests = rendered(folder)
    for pods in pods_of(manifests):
        container = pods.spec["containers"][0]
        if container["command"] != ["bridle", "launch"] or pods.job is None:
            continue
        environment = environment_of(container, manifests)
        assert environment["PET_NNODES"] == str(pods.job["completions"])
        words = expanded(container["args"], environment)
        args = parse(words[words.index("--") + 1 :])
        recipe = load_recipe(args.recipe, overrides(args))
        world = pods.job["completions"] * int(environment["PET_NPROC_PER_NODE"] or 0)
        split_batch(recipe.train, world)
        resolve_ds_config(read_ds_config(args.deepspeed_config), args.deepspeed_config, recipe.train, world)
        [port] = [port["containerPort"] for port in container["ports"] if port["name"] == "metrics"]
        assert recipe.train.prometheus_port == port
        cache = next(volume for volume in pods.spec["volumes"] if volume["name"] == "cache")["emptyDir"]["sizeLimit"]
        assert recipe.data.cache_gb * 1e9 < manifest_lint.quantity(cache)
        gpus = int(container["resources"].get("limits", {}).get("nvidia.com/gpu", environment["PET_NPROC_PER_NODE"]))
        assert gpus == int(environment["PET_NPROC_PER_NODE"] or 0)


@pytest.mark.parametrize("folder", kustomizations())
def test_the_commands_of_other_pods_parse(folder: str) -> None:
    """`bridle COMMAND` with its arguments; where the work is shared out, as many parts as there are pods."""
    manifests = rendered(folder)
    for pods in pods_of(manifests):
        for container in pods.containers:
            program, command, *rest = container["command"]
            assert program == "bridle" and command in COMMANDS
            environment = environment_of(container, manifests)
            filled = {name: value or "0" for name, value in environment.items()}
            if command not in ("launch", "serve"):
                parser = argparse.ArgumentParser()
                importlib.import_module(f"bridle.commands.{command.replace('-', '_')}").add_arguments(parser)
                args = parser.parse_args([*rest, *expanded(container.get("args", []), dict(filled))])
                if command == "tokenize":  # a node's cores are no measure of a pod's memory
                    assert args.workers == int(container["resources"]["requests"]["cpu"]) - 1
            for name in {"PARTS", "JOB_COMPLETIONS"} & environment.keys():
                assert pods.job is not None and environment[name] == str(pods.job["completions"])


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_service_takes_the_settings_of_its_manifest(folder: str) -> None:
    manifests = rendered(folder)
    for pods in pods_of(manifests):
        container = pods.spec["containers"][0]
        if container["command"] != ["bridle", "serve"]:
            continue
        environment = environment_of(container, manifests)
        settings = read_settings({}, {key: value for key, value in environment.items() if value is not None})
        assert settings.has_keys
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in (*settings.models, str(settings.api_keys_file)):
            assert any(path.startswith(f"{mount}/") for mount in mounts)


def test_jobset_and_trainjob_run_the_very_pods_of_the_job() -> None:
    [job] = [pods.job for pods in pods_of(rendered("overlays/gpu-multi-node/training"))]
    for folder in ("jobset", "trainjob"):
        manifests = rendered(f"overlays/{folder}")
        [copy] = [pods.job for pods in pods_of(manifests)]
        assert copy == job
        assert not any(manifest["kind"] in ("Job", "Service") for manifest in manifests)
    training = find(rendered("overlays/trainjob"), "TrainJob/bridle-train")["spec"]
    config = find(rendered("overlays/trainjob"), "ConfigMap/bridle-training")["data"]
    assert job is not None and training["trainer"]["numNodes"] == job["completions"]
    assert str(training["trainer"]["numProcPerNode"]) == config["PET_NPROC_PER_NODE"]


def test_node_0_is_found_by_the_name_that_each_kind_gives_it() -> None:
    """An Indexed Job's pods are JOB-INDEX, a JobSet's JOBSET-JOB-0-INDEX; under the Service's or JobSet's subdomain."""
    manifests = rendered("overlays/gpu-multi-node")
    job = find(manifests, "Job/bridle-train")
    service = find(manifests, f"Service/{job['spec']['template']['spec']['subdomain']}")
    address = find(manifests, "ConfigMap/bridle-training")["data"]["PET_MASTER_ADDR"]
    assert address == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    manifests = rendered("overlays/jobset")
    jobset = find(manifests, "JobSet/bridle-train")
    [replicated] = jobset["spec"]["replicatedJobs"]
    address = find(manifests, "ConfigMap/bridle-training")["data"]["PET_MASTER_ADDR"]
    assert address == f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"


def test_every_metric_that_a_manifest_names_is_one_of_the_codes() -> None:
    families = [*Metrics().registry.collect(), *PrometheusMetrics(0).registry.collect()]
    known = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    known |= {f"{family.name}{end}" for family in families for end in ("_total", "_bucket", "_sum", "_count")}
    text = "".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml")) + (ROOT / "docs/deploy.md").read_text()
    named = set(re.findall(r"\bbridle_(?:serve|train)_\w+", text))
    assert named and named <= known, named - known


def test_the_namespace_enforces_the_restricted_standard() -> None:
    for folder in OVERLAYS:
        for manifest in rendered(folder):
            if manifest["kind"] == "Namespace":
                assert manifest["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_documented_needs_of_the_papers_scale_are_those_of_its_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/deploy.md prints what tools/cluster_needs.py computes, and the overlay gives each node that much disk."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from cluster_needs import described, needs

    manifests = rendered("overlays/paper")
    [pods] = pods_of(manifests)
    assert pods.job is not None
    config = environment_of(pods.spec["containers"][0], manifests)
    nodes, gpus = pods.job["completions"], int(config["PET_NPROC_PER_NODE"] or 0)
    assert (nodes, gpus) == (8, 8)
    text = (ROOT / "docs/deploy.md").read_text()
    assert f"{manifest_lint.STOP_SECONDS:g} s from SIGTERM to exit code 75" in text
    for recipe, clips, size in (("audio", 2_000_000, 320e3), ("image", 1_281_167, 115e3)):
        found = needs(recipe, nodes, gpus, clips, size, 120e12)
        assert "\n".join(described(found, nodes)) in text
        assert found.dataset_bytes <= float(config["CACHE_GB"] or 0) * 1e9
