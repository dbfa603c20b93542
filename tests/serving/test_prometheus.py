"""A real Prometheus scrapes a run and a service: every rule is evaluated, every panel has data."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from launching import ROOT, environment, free_port
from launching import command as pretrain_command
from running_service import Server, serving

MONITORING = ROOT / "k8s" / "monitoring"
PATIENCE = 300.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="NO PROMETHEUS: RULES AND PANELS ARE NOT TRIED; install Debian's prometheus, or run .ci/run, which does",
    ),
]


@contextlib.contextmanager
def running(words: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as file, subprocess.Popen(words, stdout=file, stderr=file, env=environment()) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def prometheus(folder: Path, **targets: str) -> Iterator[str]:
    """Debian's Prometheus with the rules as they are shipped, scraping each second; its address."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "rules.yaml")],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [address]}]} for name, address in targets.items()
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    words = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with running([*words, f"--web.listen-address={address}"], folder / "prometheus.log"):
        yield f"http://{address}"


def ask(address: str, path: str, **query: str) -> Any:
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.get(f"{address}/api/v1/{path}", params=query, timeout=20)
        assert answer.status_code in (200, 503), (query, answer.text)
        if answer.status_code == 200:
            return answer.json()["data"]
    return {"result": [], "groups": []}


def make_every_event_happen(server: Server, sound: bytes) -> None:
    """Calls that succeed, fail and come too late; a decoding process that dies; a reload."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/tokenize", content=sound).status_code == 200
        assert client.post("/tokenize", content=b"no sound").status_code == 415
        models = server.children("model")
        for pid in models:
            os.kill(pid, signal.SIGSTOP)
        late = [client.post("/tokenize", content=sound, headers={"X-Request-Timeout": "0.3"}) for _ in range(3)]
        assert {answer.status_code for answer in late} == {504}
        for pid in models:
            os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + PATIENCE
        for pid in server.children("decode"):
            os.kill(pid, signal.SIGKILL)
        while not server.metric("bridle_serve_worker_restarts_total"):
            assert time.monotonic() < end
            client.post("/tokenize", content=sound)
        assert client.post("/v1/models/reload").status_code == 200


def test_every_rule_is_evaluated_and_every_panels_query_returns_data(
    tmp_path: Path, audio_folder: Path, sounds: list[bytes]
) -> None:
    port = free_port()
    endless = ["phases.1.steps=100000", f"train.prometheus_port={port}", "train.checkpoint_every=20"]
    with (
        running(pretrain_command(tmp_path / "run", *endless), tmp_path / "run.log"),
        serving(tmp_path, audio_folder) as server,
        prometheus(tmp_path, run=f"127.0.0.1:{port}", service=server.url.removeprefix("http://")) as address,
    ):
        make_every_event_happen(server, sounds[0])
        boards = [json.loads(path.read_text()) for path in MONITORING.glob("dashboards/*.json")]
        missing = {
            target["expr"].replace("$instance", ".+").replace("$__rate_interval", "30s")
            for board in boards
            for panel in board["panels"]
            for target in panel.get("targets", [])
        }
        assert len(missing) > 40
        end = time.monotonic() + PATIENCE
        while missing:
            assert time.monotonic() < end, (missing, (tmp_path / "run.log").read_text()[-2000:])
            missing = {query for query in missing if not ask(address, "query", query=query)["result"]}
            time.sleep(0.2)
        groups = ask(address, "rules")["groups"]
        states = {rule["name"]: (rule["health"], rule.get("state")) for group in groups for rule in group["rules"]}
        assert len(states) > 20
        assert {health for health, _ in states.values()} == {"ok"}
        firing = {name for name, (_, state) in states.items() if state == "firing"}
        assert not firing & {"BridleServeAbsent", "BridleTrainStalled", "BridleTrainHeartbeatLate"}, firing
