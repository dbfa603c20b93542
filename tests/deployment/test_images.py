"""Dockerfiles and compose.yaml, as far as one can tell without building them, which docker/build_and_check.py does."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = sorted(path.name for path in DOCKER.glob("*.Dockerfile"))
EXTRAS = {"train.Dockerfile": {"train", "s3", "tokens"}, "serve.Dockerfile": {"serving", "s3", "tracing"}}


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text())


def instructions(name: str) -> list[tuple[str, str]]:
    """Instruction and arguments, lines joined."""
    text = re.sub(
        r"\\\n\s*", "", "\n".join(line for line in (DOCKER / name).read_text().splitlines() if line[:1] != "#")
    )
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing_and_no_rule_is_ignored_without_a_reason(name: str) -> None:
    hadolint = str(Path(sys.executable).with_name("hadolint"))
    done = subprocess.run([hadolint, str(DOCKER / name)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (DOCKER / name).read_text().splitlines():
        if "hadolint ignore" in line:
            assert re.search(r"ignore=[A-Z0-9,]+ -- \w", line), f"{line}: say why behind ' -- '"
    assert not list(ROOT.glob(".hadolint.y*ml")), "rules are ignored line by line, each with its reason"


@pytest.mark.parametrize("name", FILES)
def test_an_image_takes_what_the_lock_names_and_keeps_only_what_it_runs(name: str) -> None:
    found = instructions(name)
    installs = [text for word, text in found if word == "RUN" and " install " in text and "pip" in text]
    assert len(installs) == 3
    assert all("--require-hashes" in text or "--no-deps --no-index" in text for text in installs)
    assert set(re.findall(r"--extra (\w+)", " ".join(installs))) == EXTRAS[name]
    assert not any("apt-get" in text for _, text in found)
    last = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    final = found[last:]
    assert sum(word == "FROM" for word, _ in found) >= 3
    assert [text for word, text in final if word == "COPY"] == ["--from=build /opt/bridle /opt/bridle"]
    assert [text for word, text in final if word == "USER"] == ["10001:10001"]
    labels = " ".join(text for word, text in final if word == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision", "created", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert any(word == "HEALTHCHECK" for word, _ in final)


def test_both_images_are_made_in_the_same_way() -> None:
    """But for what they are called, install and run, and the folder that they are given."""
    words = ("ARG", "FROM", "COPY", "RUN", "USER")
    kept = [
        [(word, re.sub(r" --extra.*|/runs|/models", "", text)) for word, text in instructions(name) if word in words]
        for name in FILES
    ]
    assert kept[0] == kept[1]


def test_the_build_context_has_what_the_package_is_made_of_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    names = {line[1:] for line in lines if line.startswith("!")}
    assert names == {"bridle", "serving", "ds_configs", "pyproject.toml", "README.md", "LICENSE", "requirements*.lock"}
    assert all(list(ROOT.glob(name)) for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= names


def test_every_service_of_compose_is_hardened_and_pinned_and_finds_its_files() -> None:
    services = compose()["services"]
    assert set(services) == {"train", "service", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True and service["tmpfs"] == ["/tmp"], name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":(cpu|v?\d+\.\d+\.\d+)$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose()["volumes"], volume
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    scraped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"][0] for job in scraped}
    assert targets == {"bridle-serve": "service:8000", "bridle-train": "train:9464"}
    assert set(compose("compose.gpu.yaml")["services"]) == {"train", "service"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="NO PROMTOOL: PROMETHEUS.YAML IS NOT CHECKED")
def test_promtool_accepts_the_configuration() -> None:
    words = ["promtool", "check", "config", "--syntax-only", str(DOCKER / "prometheus.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_keys_that_are_made_are_the_ones_that_are_admitted(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "make_keys.sh", tmp_path)
    command = str(Path(sys.executable).with_name("bridle"))
    made = tmp_path / "secrets"
    for _ in range(2):  # a second time changes nothing
        done = subprocess.run(
            [str(tmp_path / "make_keys.sh")],
            env={**os.environ, "BRIDLE": command}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        admitted = dict(line.split(":", 1) for line in (made / "api_keys").read_text().split())
        for file, name, scopes in (("key", "you", "use+admin"), ("metrics_key", "prometheus", "metrics")):
            key = (made / file).read_text()
            assert admitted[name] == f"{scopes}:{hashlib.sha256(key.encode()).hexdigest()}"
    assert made.stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["make_keys.sh", "secrets"]
