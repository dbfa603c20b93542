"""The service under way: processes that die, clients that dawdle or leave, reloads, keys, limits, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from running_service import Server, serving
from small_models import write_model

import bridle
from serving.engine.cores import CALM_SECONDS
from serving.web.keys import new_key


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path) -> Iterator[Server]:
    """A service that these tests may hurt; each leaves it well."""
    tmp_path = tmp_path_factory.mktemp("own")
    folder = tmp_path / "audio"
    shutil.copytree(audio_folder, folder)
    with serving(
        tmp_path, folder,
        device="cpu,cpu", threads=0, model_seconds=15, max_queue=16, header_timeout=6, body_idle_timeout=6,
    ) as running:  # fmt: skip
        yield running


@contextlib.contextmanager
def load(server: Server, contents: list[bytes], clients: int = 4, **headers: str) -> Iterator[Counter[int]]:
    """Clients in a closed loop, each with its own connections; counts the statuses, 0 for no answer."""
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def loop(offset: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
            turn = offset
            while not stop.is_set():
                turn += 1
                try:
                    statuses[client.post("/tokenize", content=contents[turn % len(contents)]).status_code] += 1
                except httpx.TransportError:
                    statuses[0] += 1

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def eventually(what: str, check: object, patience: float = 300.0) -> None:
    end = time.monotonic() + patience
    while not check():  # type: ignore[operator]
        assert time.monotonic() < end, f"not within {patience} s: {what}"
        time.sleep(0.05)


def ready(server: Server) -> bool:
    return httpx.get(server.url + "/readyz", timeout=30).status_code == 200


def test_killed_processes_fail_only_their_requests_and_come_back(own: Server, sounds: list[bytes]) -> None:
    with load(own, sounds) as statuses:
        eventually("requests are answered", lambda: statuses[200] > 10)
        for kind in ("decode", "model"):
            before, (victim, *_) = statuses[200], own.children(kind)
            os.kill(victim, signal.SIGKILL)
            eventually(f"{kind} {victim} is gone", partial(lambda k, v: v not in own.children(k), kind, victim))
            eventually("requests are answered again", partial(lambda b: statuses[200] > b + 10, before))
        eventually(
            "all processes are back",
            lambda: len(own.children("decode")) == len(own.children("model")) == 2 and ready(own),
        )
    assert set(statuses) <= {200, 503}
    assert statuses[503] <= 2 * 4 + 4  # at most those that the two processes had, and one more for each client
    assert own.metric("bridle_serve_worker_restarts_total") >= 2


def test_codes_do_not_depend_on_the_process_or_its_threads(own: Server, sounds: list[bytes]) -> None:
    model = bridle.load(own.models[0])
    expected = [model.tokenize(sound).codes.T.tolist() for sound in sounds]

    def codes(turn: int) -> object:
        answer = httpx.post(own.url + "/tokenize", content=sounds[turn % len(sounds)], timeout=60)
        return answer.json()["clips"][0]["codes"]

    time.sleep(CALM_SECONDS + 0.1)  # then a request by itself gets all cores
    assert codes(0) == expected[0]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(codes, range(32)))
    assert found == [expected[turn % len(sounds)] for turn in range(32)]


def test_a_model_process_that_hangs_leaves_the_other_at_work_and_is_replaced(own: Server, sounds: list[bytes]) -> None:
    stuck, well = own.children("model")
    os.kill(stuck, signal.SIGSTOP)
    with load(own, sounds, clients=4, **{"X-Request-Timeout": "8"}) as statuses:
        # Clients that never wait for each other: asked one by one, the idle process that hangs may never get a batch.
        eventually("the process that hangs is ended", lambda: stuck not in own.children("model"))
        enough = statuses[200] + 5
        eventually("requests are answered", lambda: statuses[200] > enough)
    assert set(statuses) == {200, 504}
    assert 1 <= statuses[504] <= 4  # those of one batch: a client has one request under way
    eventually("another takes its place", lambda: len(own.children("model")) == 2)
    assert well in own.children("model")


def test_reload_under_load_fails_no_request_and_takes_the_new_weights(own: Server, sounds: list[bytes]) -> None:
    folder = own.models[0]
    before = httpx.get(own.url + "/info", timeout=60).json()["models"][0]["sha256"]
    with load(own, sounds) as statuses:
        eventually("requests are answered", lambda: statuses[200] > 5)
        assert httpx.post(own.url + "/v1/models/reload", timeout=120).status_code == 200
        write_model(folder, seed=1, name="audio-test")
        own.process.send_signal(signal.SIGHUP)
        eventually(
            "the new weights", lambda: httpx.get(own.url + "/info", timeout=60).json()["models"][0]["sha256"] != before
        )
        enough = statuses[200] + 5
        eventually("requests are answered", lambda: statuses[200] > enough)
    assert set(statuses) == {200}
    codes = httpx.post(own.url + "/tokenize", content=sounds[0], timeout=60).json()["clips"][0]["codes"]
    assert codes == bridle.load(folder).tokenize(sounds[0]).codes.T.tolist()
    eventually("the old processes end", lambda: len(own.children("model")) == len(own.children("decode")) == 2)
    (folder / "model.safetensors").write_bytes(b"damaged")
    answer = httpx.post(own.url + "/v1/models/reload", timeout=120)
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:bridle:problem:reload-failed")
    assert httpx.post(own.url + "/tokenize", content=sounds[0], timeout=60).json()["clips"][0]["codes"] == codes
    write_model(folder, seed=1, name="audio-test")


def test_sigterm_fails_readiness_then_drains_and_leaves_nobody_behind(
    tmp_path: Path, audio_folder: Path, sounds: list[bytes]
) -> None:
    with serving(tmp_path, audio_folder, lame_duck_seconds=12) as server:
        children = server.children("decode") + server.children("model")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            server.process.send_signal(signal.SIGTERM)
            eventually("readiness fails", lambda: client.get("/readyz").status_code == 503)
            answer = client.get("/readyz")
            assert answer.json()["type"] == "urn:bridle:problem:unavailable"
            assert client.get("/livez").status_code == 200
            assert client.post("/tokenize", content=sounds[0]).status_code == 200
        assert server.process.wait(300) == 0
        eventually("all processes end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def test_slow_and_silent_connections_stop_nobody(own: Server, sounds: list[bytes]) -> None:
    host, port = "127.0.0.1", int(own.url.rsplit(":", 1)[1])
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, port))) for _ in range(1000)]
        slow = [stack.enter_context(socket.create_connection((host, port))) for _ in range(8)]
        for sock in slow[:4]:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        for sock in slow[4:]:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nRIFF")
        for _ in range(5):
            assert httpx.post(own.url + "/tokenize", content=sounds[0], timeout=60).status_code == 200
        for sock in slow:
            sock.settimeout(60)
            assert sock.recv(1000).startswith(b"HTTP/1.1 408")
        for sock in idle[::100]:
            sock.settimeout(60)
            assert sock.recv(1000) == b""
    assert own.metric("bridle_serve_queued") == 0


def test_a_full_queue_answers_429_with_retry_after(own: Server, sounds: list[bytes]) -> None:
    async def burst() -> list[httpx.Response]:
        """80 at once while no model works: it goes on when those are answered that found no place."""
        pids = own.children("model")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        answers, limits = [], httpx.Limits(max_connections=80)
        try:
            async with httpx.AsyncClient(base_url=own.url, timeout=60, limits=limits) as client:
                for one in asyncio.as_completed([client.post("/tokenize", content=sounds[0]) for _ in range(80)]):
                    answers.append(await one)
                    if len(answers) == 64:
                        for pid in pids:
                            os.kill(pid, signal.SIGCONT)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        return answers

    answers = asyncio.run(burst())
    busy = [answer for answer in answers if answer.status_code == 429]
    assert Counter(answer.status_code for answer in answers) == {200: 16, 429: 64}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in busy)
    assert busy[0].json()["type"] == "urn:bridle:problem:busy"
    files = [("file", sounds[0])] * 17
    assert httpx.post(own.url + "/tokenize", files=files, timeout=60).status_code == 413  # to wait would not help


def test_work_of_gone_clients_and_past_deadlines_is_dropped(own: Server, sounds: list[bytes]) -> None:
    dropped, long = own.metric("bridle_serve_dropped_total"), sounds[0]
    pids = own.children("model")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(10):  # two may be inside the model; the others wait in the queue
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(own.url + "/tokenize", content=long, timeout=httpx.Timeout(60, read=0.3))
        answer = httpx.post(own.url + "/tokenize", content=long, headers={"X-Request-Timeout": "0.5"}, timeout=60)
        assert answer.status_code == 504
        assert answer.json()["type"] == "urn:bridle:problem:deadline"
        eventually("the queue is empty", lambda: own.metric("bridle_serve_queued") == 0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert httpx.post(own.url + "/tokenize", content=long, timeout=60).status_code == 200
    assert own.metric("bridle_serve_dropped_total") >= dropped + 8


def test_keys_and_scopes_open_what_they_should(tmp_path: Path, audio_folder: Path, sounds: list[bytes]) -> None:
    use, use_line = new_key("user")
    watch, watch_line = new_key("watcher", ("metrics",))
    admin, admin_line = new_key("boss", ("use", "admin"))
    file = tmp_path / "keys"
    file.write_text(f"# who may what\n{use_line}\n{watch_line}\n{admin_line}\n")

    def status(path: str, key: str | None, method: str = "GET", **options: object) -> int:
        headers = {"Authorization": f"Bearer {key}".encode()} if key is not None else {}
        return httpx.request(method, server.url + path, headers=headers, timeout=60, **options).status_code  # type: ignore[arg-type]

    with serving(tmp_path, audio_folder, host="0.0.0.0", api_keys_file=file) as server:
        for path in ("/", "/docs", "/info", "/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert status(path, None) == status(path, "wrong") == status(path, "é") == 401, path
        assert status("/livez", None) == status("/readyz", None) == 200
        assert status("/tokenize", None, "POST", content=sounds[0]) == 401
        assert status("/tokenize", use, "POST", content=sounds[0]) == 200
        assert [status("/metrics", key) for key in (use, watch, admin)] == [403, 200, 403]
        assert [status("/info", key) for key in (use, watch, admin)] == [200, 403, 200]
        assert [status("/v1/models/reload", key, "POST") for key in (use, watch)] == [403, 403]
        assert httpx.get(server.url + "/info", auth=("any", use), timeout=60).status_code == 200
        assert httpx.get(server.url + "/info", headers={"X-API-Key": use}, timeout=60).status_code == 200
        fresh, fresh_line = new_key("fresh")
        file.write_text(fresh_line + "\n")
        time.sleep(1.2)  # it looks with the first request after a second
        assert (status("/info", fresh), status("/info", use)) == (200, 401)
        file.write_text("damaged\n")
        time.sleep(1.2)
        assert (status("/info", fresh), status("/info", use)) == (200, 401)
        log = json.dumps(server.lines())
        assert not any(key in log for key in (use, watch, admin, fresh))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--host", "0.0.0.0"], "not loopback"),
        (["--api-keys", ""], "empty"),
        (["--api-keys", "a:use:" + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"], "empty key"),
        (["--api-keys", "secret"], "name:scopes:sha256"),
        (["--api-keys-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--max-batch", "-1"], "max_batch"),
        (["--port", "http"], "port"),
    ],
)
def test_settings_that_cannot_be_honoured_refuse_to_start(audio_folder: Path, flags: list[str], told: str) -> None:
    command = [sys.executable, "-m", "bridle.cli", "serve", str(audio_folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
