"""Attacks that once starved others: each runs here while an honest client asks, and is answered."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from running_service import Server, serving

from serving.engine.deployment import PIECE_NUMBERS

NPZ = "application/x-npz"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path, image_folder: Path) -> Iterator[Server]:
    """A service with few places, so that an attack needs little."""
    with serving(
        tmp_path_factory.mktemp("fair"), audio_folder, image_folder,
        max_queue=16, max_queue_bytes=64_000_000, max_connections=48, max_clips=16, decode_cpu_seconds=1,
        body_idle_timeout=10, header_timeout=30, min_send_rate=20_000_000, min_receive_rate=10_000,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def patient(tmp_path: Path, image_folder: Path) -> Iterator[Server]:
    """A service that gives up nobody while a busy machine keeps the test itself waiting."""
    with serving(
        tmp_path, image_folder,
        max_connections=48, decode_cpu_seconds=60, body_idle_timeout=60, header_timeout=60, min_receive_rate=0,
    ) as running:  # fmt: skip
        yield running


def ask(server: Server, content: bytes, address: str = "127.0.0.1", **headers: str) -> tuple[int, float]:
    """An honest request's status and seconds, from an address of its own."""
    began = time.monotonic()
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(transport=transport, timeout=60) as client:
        status = client.post(server.url + "/tokenize", content=content, headers=headers).status_code
    return status, time.monotonic() - began


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def eventually(what: str, check: object, patience: float = 300.0) -> None:
    end = time.monotonic() + patience
    while not check():  # type: ignore[operator]
        assert time.monotonic() < end, f"not within {patience} s: {what}"
        time.sleep(0.1)


def test_a_hundred_thousand_tiny_clips_hold_nobody_up(small: Server, sounds: list[bytes]) -> None:
    body = b'{"clips":[' + b",".join([b'{"codes":[[1]]}'] * 100_000) + b"]}"
    lists = b'{"clips":[{"codes":[' + b",".join([b"[]"] * 500_000) + b"]}]}"
    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(2) as pool:
        url = small.url + "/dequantize?modality=audio"
        attacks = [pool.submit(httpx.post, url, content=one, headers=headers, timeout=120) for one in (body, lists)]
        honest = [ask(small, sounds[0]) for _ in range(5)]
        assert [status for status, _ in honest] == [200] * 5
        assert [attack.result().status_code for attack in attacks] == [413, 422]
    assert max(seconds for _, seconds in honest) < 10


def test_an_answer_that_nobody_reads_is_not_made_and_its_reader_is_cut_off(small: Server, sounds: list[bytes]) -> None:
    numbers, readers = 1_000_000, 6
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out, out.open("codes.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros((1, numbers), np.uint8))
    body = file.getvalue()
    assert len(body) < 10_000
    head = f"POST /dequantize?modality=audio HTTP/1.1\r\nHost: localhost\r\nContent-Type: {NPZ}\r\nAccept: {NPZ}\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    dim = httpx.get(small.url + "/info", timeout=60).json()["models"][0]["dim"]
    whole = 4 * dim * numbers
    assert whole > 64_000_000 / 2  # of max_queue_bytes: not even one had a place, were it made before it is read
    made, before = small.metric("bridle_serve_clips_total"), small.resident_bytes()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(small)) for _ in range(readers)]
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(request)
        assert [sock.recv(12) for sock in socks] == [b"HTTP/1.1 200"] * readers
        assert 0 < small.metric("bridle_serve_upload_bytes") <= 64_000_000
        assert ask(small, sounds[0])[0] == 200
        eventually("slow readers are cut off", lambda: small.metric("bridle_serve_upload_bytes") == 0)
        pieces = small.metric("bridle_serve_clips_total") - made
    assert readers <= 4 * PIECE_NUMBERS * pieces < readers * whole / 3  # the kernel's buffers hold some megabytes each
    assert small.resident_bytes() - before < readers * whole / 3


def test_who_dribbles_a_body_takes_no_place(small: Server, sounds: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(small)) for _ in range(30)]
        for sock in slow:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nRIFF")
        began = time.monotonic()
        while time.monotonic() - began < 4:
            for sock in slow:
                with contextlib.suppress(ConnectionError):  # a busy machine keeps this loop waiting longer than that
                    sock.sendall(b"x")
            assert ask(small, sounds[0])[0] == 200
        time.sleep(2.5)
        for sock in slow:  # 10,000 bytes a second, after five seconds
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"x")
        for sock in slow:
            assert sock.recv(1000).startswith(b"HTTP/1.1 408")


def many_scans(count: int) -> bytes:
    """A large progressive JPEG of one colour, one scan of whose is there `count` times more: few bytes, much work."""
    file = io.BytesIO()
    Image.new("L", (7000, 7000), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    tables = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xc4"]
    end = min(at for at in (*tables, *starts[2:]) if at > starts[1])  # the next scan's tables are not this one's
    return data[:end] + data[starts[1] : end] * count + data[end:]


def test_a_picture_made_to_be_slow_ends_with_its_deadline_or_its_cpu_time(small: Server, pictures: list[bytes]) -> None:
    slow = many_scans(1200)
    with ThreadPoolExecutor(6) as pool:
        attacks = [pool.submit(ask, small, slow, **{"X-Request-Timeout": "0.8"}) for _ in range(6)]
        time.sleep(0.5)
        status, seconds = ask(small, pictures[0], "127.0.0.2")
        assert (status, seconds < 30) == (200, True)  # one picture takes minutes
        assert {attack.result()[0] for attack in attacks} <= {504, 413, 408}  # 408: not even sent in time
    answer = httpx.post(small.url + "/tokenize", content=slow, timeout=60)
    assert answer.status_code == 413, answer.text


def test_one_address_does_not_hold_all_decoders_while_others_are_about(patient: Server, pictures: list[bytes]) -> None:
    slow = many_scans(2400)
    assert ask(patient, pictures[0], "127.0.0.2")[0] == 200
    with ThreadPoolExecutor(4) as pool:
        attacks = [pool.submit(ask, patient, slow, "127.0.0.4", **{"X-Request-Timeout": "20"}) for _ in range(4)]
        eventually("all are under way", lambda: patient.metric("bridle_serve_queued") == 4)
        assert ask(patient, pictures[0], "127.0.0.2")[0] == 200
        assert not any(attack.done() for attack in attacks)  # each costs a decoder many seconds of CPU
        assert {attack.result()[0] for attack in attacks} <= {200, 504}


def test_a_log_that_nobody_reads_stops_nothing(audio_folder: Path) -> None:
    command = [sys.executable, "-m", "bridle.cli", "serve", str(audio_folder), "--port=0", "--device=cpu"]
    process = subprocess.Popen([*command, "--decode-workers=1", "--lame-duck-seconds=0"], stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr)
        port = next(line["port"] for line in lines if line["event"] == "ready")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert Counter(client.get("/v1/models").status_code for _ in range(1000)) == {200: 1000}
        process.terminate()
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()


def test_probes_find_a_place_among_idle_and_busy_connections(patient: Server) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(patient.url + path, timeout=60)

    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(patient)) for _ in range(60)]
        for _ in range(3):
            assert get("/readyz").status_code == 200
        assert get("/info").status_code == 200
        idle[0].settimeout(30)
        assert idle[0].recv(10) == b""  # the longest idle one made room
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(patient)) for _ in range(60)]
        for sock in busy:
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nRIFF")
        eventually("all places are taken", lambda: get("/info").status_code != 200)
        assert get("/livez").status_code == 200
        refused = get("/info")
        assert (refused.status_code, refused.json()["type"]) == (429, "urn:bridle:problem:busy")


def test_one_address_does_not_take_all_places_while_others_wait(small: Server, sounds: list[bytes]) -> None:
    long, done = max(sounds, key=len), threading.Event()
    statuses: Counter[int] = Counter()

    def greedy() -> None:
        transport = httpx.HTTPTransport(local_address="127.0.0.3")
        with httpx.Client(transport=transport, timeout=60) as client:
            while not done.is_set():
                answer = client.post(small.url + "/tokenize", files=[("file", long)] * 8)
                statuses[answer.status_code] += 1

    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            pool.submit(greedy)
        try:
            eventually("the greedy one is at work", lambda: statuses[200])
            ask(small, sounds[0], "127.0.0.2")  # from now on somebody waits
            eventually("what it held is done", lambda: small.metric("bridle_serve_queued") <= 8)
            found = Counter(ask(small, sounds[0], "127.0.0.2")[0] for _ in range(12))
        finally:
            done.set()
    assert found == {200: 12}
    assert set(statuses) == {200, 429}
