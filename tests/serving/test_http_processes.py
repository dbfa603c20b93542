"""Several HTTP processes behind one port: one service to its clients, its metrics, its bounds and its operator."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from running_service import Server, serving
from small_models import write_model

import bridle

CONNECTIONS = 24
"""So many connections all go to one of two processes once in 8 million runs."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path) -> Iterator[Server]:
    """Two HTTP processes; each test leaves both well."""
    tmp_path = tmp_path_factory.mktemp("two")
    shutil.copytree(audio_folder, tmp_path / "audio")
    with serving(tmp_path, tmp_path / "audio", http_processes=2, device="cpu,cpu", max_queue=16) as running:
        yield running


def eventually(what: str, check: object, patience: float = 300.0) -> None:
    end = time.monotonic() + patience
    while not check():  # type: ignore[operator]
        assert time.monotonic() < end, f"not within {patience} s: {what}"
        time.sleep(0.1)


def post(server: Server, content: bytes, files: int = 1, address: str = "127.0.0.1") -> httpx.Response:
    """A request over a connection of its own."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(transport=transport, timeout=60) as client:
        return client.post(server.url + "/tokenize", files=[("file", content)] * files)


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_both_take_connections_and_metrics_are_of_both(two: Server, sounds: list[bytes]) -> None:
    def open_files() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in two.http_processes()]

    before, done = open_files(), two.metric("bridle_serve_clips_total")
    assert len(before) == 2
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=two.url, timeout=60)) for _ in range(CONNECTIONS)]
        assert {client.post("/tokenize", content=sounds[0]).status_code for client in clients} == {200}
        grown = [after - first for after, first in zip(open_files(), before, strict=True)]
    assert min(grown) >= 1
    assert sum(grown) == pytest.approx(CONNECTIONS, abs=3)
    for _ in range(6):  # whichever process is asked
        assert two.metric("bridle_serve_clips_total") == done + CONNECTIONS
    text = httpx.get(two.url + "/metrics", timeout=60).text
    assert text.count("\nbridle_serve_ready ") == 1
    assert two.metric("bridle_serve_ready") == two.metric("bridle_serve_model_info") == 1
    assert (
        len(httpx.get(two.url + "/info", timeout=60).json()["models"][0]["device"]) == len(two.children("model")) == 2
    )


def test_the_queue_and_its_shares_are_those_of_both(two: Server, sounds: list[bytes]) -> None:
    with stopped(two.children("model")), ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, two, sounds[0], 10, "127.0.0.2")
        eventually("ten files are under way", lambda: two.metric("bridle_serve_queued") == 10)
        for _ in range(8):  # whichever process is asked
            refused = post(two, sounds[0], 7, "127.0.0.3")
            assert refused.status_code == 429
            assert "10 files are under way, max_queue is 16" in refused.json()["detail"]
        for _ in range(8):
            refused = post(two, sounds[0], 1, "127.0.0.2")
            assert "10 files of yours are under way, and others wait; a share is 8" in refused.json()["detail"]
        rest = pool.submit(post, two, sounds[0], 6, "127.0.0.3")
        eventually("sixteen files are under way", lambda: two.metric("bridle_serve_queued") == 16)
        for pid in two.children("model"):
            os.kill(pid, signal.SIGCONT)
        assert (first.result().status_code, rest.result().status_code) == (200, 200)
    assert two.metric("bridle_serve_queued") == 0
    assert post(two, sounds[0], 16).status_code == 200


def test_a_reload_reaches_both(two: Server, sounds: list[bytes]) -> None:
    folder = two.models[0]
    write_model(folder, seed=1, name="audio-test")
    assert httpx.post(two.url + "/v1/models/reload", timeout=120).status_code == 200
    expected = bridle.load(folder).tokenize(sounds[0]).codes.T.tolist()
    for _ in range(CONNECTIONS):
        assert post(two, sounds[0]).json()["clips"][0]["codes"] == expected


def test_one_that_dies_is_replaced_while_the_other_serves(two: Server, sounds: list[bytes]) -> None:
    (victim, other), done = two.http_processes(), two.metric("bridle_serve_clips_total")
    with ThreadPoolExecutor(8) as pool, stopped(two.children("model")):
        asked = [pool.submit(post, two, sounds[0]) for _ in range(8)]
        eventually("all are under way", lambda: two.metric("bridle_serve_queued") == 8)
        os.kill(victim, signal.SIGKILL)
    statuses: Counter[object] = Counter()
    for one in asked:
        error = one.exception()
        statuses[type(error).__name__ if error else one.result().status_code] += 1
    assert set(statuses) <= {200, "RemoteProtocolError", "ReadError"}
    eventually("only the other is there", lambda: victim not in two.http_processes())
    served = two.metric("bridle_serve_clips_total")
    assert served >= done  # what the dead one had counted is not forgotten
    while len(two.http_processes()) < 2:
        assert post(two, sounds[0]).status_code == 200
    eventually("another takes its place", lambda: sum(line["event"] == "ready" for line in two.lines()) > 1)
    assert other in two.http_processes()
    assert two.metric("bridle_serve_clips_total") >= served
    assert post(two, sounds[0], 16).status_code == 200  # what it held is given back
    assert httpx.get(two.url + "/readyz", timeout=60).status_code == 200


@pytest.mark.slow
def test_sigterm_drains_both_and_leaves_nobody_behind(tmp_path: Path, audio_folder: Path, sounds: list[bytes]) -> None:
    with serving(tmp_path, audio_folder, http_processes=2, device="cpu", lame_duck_seconds=12) as server:
        pids = [*server.http_processes(), *server.children("model"), *server.children("decode")]
        assert len(pids) >= 6
        statuses: Counter[int] = Counter()
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                statuses[post(server, sounds[0]).status_code] += 1

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask) for _ in range(2)]
            server.process.send_signal(signal.SIGTERM)
            eventually("readiness fails", lambda: httpx.get(server.url + "/readyz", timeout=60).status_code == 503)
            time.sleep(0.5)
            stop.set()
            assert [one.result() for one in asking] == [None, None]
        assert set(statuses) == {200}
        assert server.process.wait(300) == 0
        eventually("all processes end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.slow
def test_none_outlives_the_first(tmp_path: Path, audio_folder: Path) -> None:
    with serving(tmp_path, audio_folder, http_processes=2, device="cpu") as server:
        pids = [*server.http_processes(), *server.children("model"), *server.children("decode")]
        server.process.kill()
        eventually("all processes end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.slow
def test_a_taken_port_and_a_wrong_folder_are_told_once(two: Server, tmp_path: Path) -> None:
    port = two.url.rpartition(":")[2]

    def told(folder: Path, port: str) -> str:
        command = [sys.executable, "-m", "bridle.cli", "serve", str(folder), "--http-processes=2", f"--port={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in told(two.models[0], port)
    assert told(tmp_path / "nothing", "0").count(str(tmp_path / "nothing")) == 1
