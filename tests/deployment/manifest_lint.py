"""What no schema knows of the manifests: that names meet, that limits hold, and that the code has what they mention."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from decimal import Decimal

from manifests import Manifest, Pods, environment_of, name_of, pods_of

from serving.settings import PREFIX, ServeSettings

QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
SCALE = {
    None: 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
SECRETS = {"bridle-s3", "bridle-api-keys", "bridle-metrics-key"}
"""Made by hand, as docs/deploy.md says."""
ROUTES = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
STOP_SECONDS = 148.0
"""From SIGTERM to the end of a run of recipe `audio`, measured on a crowded machine: docs/deploy.md."""
WRONG_ARGUMENTS, STOPPED = 2, 75
"""Exit codes; docs/training.md."""
PRETRAIN = ["bridle", "launch"]


def quantity(text: object) -> Decimal:
    """A number of Kubernetes, such as 500m or 8Gi.

    Raises:
        ValueError
    """
    match = QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(match[1]) * SCALE[match[2]]


def lint(manifests: list[Manifest]) -> list[str]:
    """One line for each fault."""
    found = []
    for rule in RULES:
        try:
            found += [f"{where}: {fault}" for where, fault in rule(manifests)]
        except ValueError as error:
            found.append(str(error))
    return found


Faults = Iterator[tuple[str, str]]


def names_meet(manifests: list[Manifest]) -> Faults:
    """Services, budgets, policies, monitors and spreads choose pods that are there, and ports that these have."""
    pods = list(pods_of(manifests))
    for manifest in manifests:
        spec, where = manifest.get("spec", {}), name_of(manifest)
        kind = manifest["kind"]
        if kind == "Service":
            chosen = [pod for pod in pods if matches(spec["selector"], pod)]
            if not chosen:
                yield where, "selects no pods"
            for port in spec["ports"]:
                if spec.get("clusterIP") != "None" or "targetPort" in port:
                    yield from missing_port(where, port.get("targetPort", port["port"]), chosen)
        elif kind in ("PodDisruptionBudget", "PodMonitor"):
            chosen = [pod for pod in pods if matches(spec["selector"]["matchLabels"], pod)]
            if not chosen:
                yield where, "selects no pods"
            for end in spec.get("podMetricsEndpoints", []):
                yield from missing_port(where, end["port"], chosen)
        elif kind == "NetworkPolicy":
            chosen = [pod for pod in pods if matches(spec["podSelector"]["matchLabels"], pod)]
            if not chosen:
                yield where, "selects no pods"
            for rule in spec.get("ingress", []):
                for port in rule.get("ports", []):
                    yield from missing_port(where, port["port"], chosen)
        elif kind == "ServiceMonitor":
            services = [
                each for each in manifests
                if each["kind"] == "Service" and spec["selector"]["matchLabels"].items() <= labels(each).items()
            ]  # fmt: skip
            named = {port["name"] for service in services for port in service["spec"]["ports"]}
            for end in spec["endpoints"]:
                if end["port"] not in named:
                    yield where, f"port {end['port']} is not one of a service it selects"
        elif kind == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            if f"{target['kind']}/{target['name']}" not in map(name_of, manifests):
                yield where, f"scales {target['name']}, which is not there"
        elif kind == "Deployment" and not matches(spec["selector"]["matchLabels"], next(pods_of([manifest]))):
            yield where, "its selector is not its pods' labels"


def references_meet(manifests: list[Manifest]) -> Faults:
    """ConfigMaps, Secrets, claims, accounts, priorities and volumes that pods name are there, and none is idle."""
    there = {name_of(manifest) for manifest in manifests}
    for pod in pods_of(manifests):
        wanted = []
        mounted = set()
        for container in pod.containers:
            for source in container.get("envFrom", []):
                wanted += [f"ConfigMap/{ref['name']}" for key, ref in source.items() if key == "configMapRef"]
                wanted += [f"Secret/{ref['name']}" for key, ref in source.items() if key == "secretRef"]
            mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                wanted.append(f"PersistentVolumeClaim/{claim['claimName']}")
            if secret := volume.get("secret"):
                wanted.append(f"Secret/{secret['secretName']}")
            if len(volume) != 2:
                yield pod.where, f"volume {volume['name']} has {len(volume) - 1} sources"
        for key, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
            wanted += [f"{kind}/{pod.spec[key]}"] if key in pod.spec else []
        for name in sorted(set(wanted) - there - {f"Secret/{secret}" for secret in SECRETS} - OUTSIDE):
            yield pod.where, f"names {name}, which is not there"
        for name in sorted(mounted ^ set(volumes)):
            yield (
                pod.where,
                f"volume {name} is {'mounted but not there' if name in mounted else 'there but not mounted'}",
            )


OUTSIDE = {"PersistentVolumeClaim/bridle-runs"}
"""The serving half of an overlay takes the training half's volume."""


def quantities_parse(manifests: list[Manifest]) -> Faults:
    """Requests fit limits, memory is limited, memory volumes fit into it, devices are requested as they are limited."""
    for pod in pods_of(manifests):
        in_memory: dict[str, Decimal] = {}
        for volume in pod.spec.get("volumes", []):
            empty = volume.get("emptyDir")
            if empty is not None and "sizeLimit" not in empty:
                yield pod.where, f"volume {volume['name']} has no sizeLimit"
            elif empty is not None and empty.get("medium") == "Memory":
                in_memory[volume["name"]] = quantity(empty["sizeLimit"])
        for container in pod.containers:
            where = f"{pod.where} {container['name']}"
            resources = container.get("resources", {})
            requests = {key: quantity(value) for key, value in resources.get("requests", {}).items()}
            limits = {key: quantity(value) for key, value in resources.get("limits", {}).items()}
            if not {"cpu", "memory"} <= requests.keys() or "memory" not in limits:
                yield where, "cpu or memory is not requested, or memory not limited"
                continue
            for key, value in requests.items():
                if value > limits.get(key, value):
                    yield where, f"requests more {key} than its limit"
            devices = {key for key in requests.keys() | limits.keys() if "/" in key}
            for key in sorted(devices):
                if requests.get(key) != limits.get(key):
                    yield where, f"{key}: requests and limits differ"
            on_disk = sum(
                quantity(empty["sizeLimit"])
                for volume in pod.spec.get("volumes", [])
                if (empty := volume.get("emptyDir")) and not empty.get("medium")
            )
            if on_disk > limits.get("ephemeral-storage", on_disk):
                yield where, "its disk volumes may grow past its limit of ephemeral-storage, which evicts it"
            mounted = sum(in_memory.get(mount["name"], Decimal(0)) for mount in container.get("volumeMounts", []))
            if mounted >= limits["memory"]:
                yield where, "its memory volumes could take all of its memory"


def pods_are_restricted(manifests: list[Manifest]) -> Faults:
    """Pod Security "restricted", and more: read-only root, no token, no service links."""
    for pod in pods_of(manifests):
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield pod.where, "may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield pod.where, "has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.where, "gets a token that it does not need"
        if pod.spec.get("enableServiceLinks") is not False:
            yield pod.where, "gets service links as variables"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(key):
                yield pod.where, f"{key} is set"
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield pod.where, f"volume {volume['name']} is a host's path"
        for container in pod.containers:
            inner = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            if inner != wanted:
                yield pod.where, f"{container['name']}: expected securityContext {wanted}"


def probes_and_grace(manifests: list[Manifest]) -> Faults:
    """Probes ask the right routes of named ports; graces outlast a drain and a checkpoint."""
    for pod in pods_of(manifests):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for container in pod.containers:
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            serves = container.get("command", [])[:2] == ["bridle", "serve"]
            for probe, route in ROUTES.items():
                asked = container.get(probe, {}).get("httpGet", {})
                if serves and (asked.get("path") != route or asked.get("port") not in ports):
                    yield pod.where, f"{probe} asks {asked.get('path')} of port {asked.get('port')}, expected {route}"
            if serves:
                environment = environment_of(container, manifests)
                if str(ports.get("http")) != environment.get("BRIDLE_PORT"):
                    yield pod.where, "BRIDLE_PORT is not the port named http"
                drain = sum(
                    float(environment.get(f"{PREFIX}{name.upper()}") or ServeSettings.model_fields[name].default)
                    for name in ("lame_duck_seconds", "drain_seconds")
                )
                before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
                if not before or grace < drain + before + 10:
                    yield pod.where, f"a grace of {grace} s is too short for {before} + {drain:g} s of draining"
            elif container.get("command", [])[:2] == PRETRAIN and grace < STOP_SECONDS:
                yield pod.where, f"a grace of {grace} s is shorter than a stop, measured at {STOP_SECONDS:g} s"


def jobs_fail_and_go_on(manifests: list[Manifest]) -> Faults:
    """Exit code 2 fails at once, disruption never counts, and the retries reach further than one loss of a pod."""
    for pod in pods_of(manifests):
        job = pod.job
        if job is None:
            continue
        if pod.spec.get("restartPolicy") != "Never":
            yield pod.where, "a podFailurePolicy needs restartPolicy Never"
        if job.get("completionMode") != "Indexed" or job["completions"] != job["parallelism"]:
            yield pod.where, "completionMode is not Indexed, or not all pods run at once"
        names = {container["name"] for container in pod.spec["containers"]}
        rules = job.get("podFailurePolicy", {}).get("rules", [])
        exits = {
            code: rule["action"] for rule in reversed(rules) for code in rule.get("onExitCodes", {}).get("values", [])
        }
        if exits.get(WRONG_ARGUMENTS) != "FailJob":
            yield pod.where, "exit code 2 does not fail the job at once"
        trains = pod.spec["containers"][0]["command"][:2] == PRETRAIN
        if trains and exits.get(STOPPED) != "Ignore":
            yield pod.where, "exit code 75, a stop by signal, counts as a failure"
        if not any(
            rule["action"] == "Ignore" and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
            for rule in rules
            if "onPodConditions" in rule
        ):
            yield pod.where, "a disruption counts as a failure"
        for rule in rules:
            if rule.get("onExitCodes", {}).get("containerName", next(iter(names))) not in names:
                yield pod.where, "its podFailurePolicy names a container that is not there"
        if trains and job.get("backoffLimit", 6) < 4 * job["completions"]:
            yield pod.where, "its backoffLimit is below four losses of every pod"
        if "backoffLimitPerIndex" in job and trains:
            yield pod.where, "ranks cannot fail one by one"


def variables_are_read(manifests: list[Manifest], in_code: Callable[[str], bool]) -> Faults:
    """Each variable is a setting of the service, used in the arguments, or read by the code or a library."""
    for pod in pods_of(manifests):
        for container in pod.containers:
            words = " ".join(container.get("args", []))
            environment = environment_of(container, manifests)
            for name in environment:
                setting = name.removeprefix(PREFIX).lower() in ServeSettings.model_fields
                if not (setting if name.startswith(PREFIX) else f"$({name})" in words or in_code(name)):
                    yield f"{pod.where} {container['name']}", f"nothing reads {name}"
            for name in re.findall(r"\$\((\w+)\)", words):
                if name not in environment:
                    yield f"{pod.where} {container['name']}", f"$({name}) is not defined"


def matches(selector: dict[str, str], pod: Pods) -> bool:
    return selector.items() <= pod.metadata.get("labels", {}).items()


def labels(manifest: Manifest) -> dict[str, str]:
    found: dict[str, str] = manifest["metadata"].get("labels", {})
    return found


def missing_port(where: str, port: str | int, pods: list[Pods]) -> Faults:
    there = {
        key for pod in pods for container in pod.containers for each in container.get("ports", [])
        for key in (each["name"], each["containerPort"])
    }  # fmt: skip
    if port not in there:
        yield where, f"port {port} is none of its pods'"


RULES = [
    names_meet, references_meet, quantities_parse, pods_are_restricted, probes_and_grace, jobs_fail_and_go_on,
]  # fmt: skip
