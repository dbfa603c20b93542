"""Models that are loaded again while requests are under way, and while others reload; requests that never find room."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from running_service import Server, serving


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path, image_folder: Path) -> Iterator[Server]:
    """Sound and pictures, a model process each."""
    with serving(
        tmp_path_factory.mktemp("own"),
        audio_folder,
        image_folder,
        decode_workers=1,
        body_idle_timeout=300,
        max_queue_bytes=1_000_000,
    ) as running:
        yield running


def eventually(what: str, check: Callable[[], bool], patience: float = 300.0) -> None:
    end = time.monotonic() + patience
    while not check():
        assert time.monotonic() < end, f"not within {patience} s: {what}"
        time.sleep(0.05)


def reload(server: Server, **parameters: str) -> int:
    return httpx.post(server.url + "/v1/models/reload", params=parameters, timeout=300).status_code


def test_reloads_beside_each_other_leave_one_model(own: Server) -> None:
    before = set(own.children("model"))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: reload(own), range(3))) == [200] * 3
    eventually("the old processes end", lambda: not before & set(own.children("model")))
    eventually("one process a model is left", lambda: len(own.children("model")) == 2, patience=60)
    assert len(own.children("decode")) == 2


def test_a_model_that_a_request_comes_to_later_is_kept_for_it(
    own: Server, sounds: list[bytes], pictures: list[bytes]
) -> None:
    def ask() -> list[dict[str, object]]:
        files = [("file", sounds[0]), ("file", pictures[0])]
        headers = {"Accept": "application/x-ndjson", "X-Request-Timeout": "60"}
        answer = httpx.post(own.url + "/tokenize", files=files, headers=headers, timeout=300)
        return [json.loads(line) for line in answer.text.splitlines()]

    halted = own.children("model")
    for pid in halted:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        try:
            lines = pool.submit(ask)
            eventually("both files are under way", lambda: own.metric("bridle_serve_queued") == 2)
            assert reload(own, model="image-test") == 200
        finally:
            for pid in halted:
                os.kill(pid, signal.SIGCONT)
        found = lines.result()
    assert found[-1] == {"clip": 1, "end": True, "windows": 1, "duration_s": None}


def test_a_reload_while_a_body_comes_costs_no_request(own: Server) -> None:
    file = io.BytesIO()
    np.savez(file, codes=np.zeros((1, 3), np.int64))
    content, reloaded = file.getvalue(), threading.Event()

    def body() -> Iterator[bytes]:
        yield content[:-1]
        assert reload(own, model="audio-test") == 200
        assert httpx.get(own.url + "/info", timeout=60).status_code == 200  # the loop has had its rounds
        reloaded.set()
        yield content[-1:]

    headers = {"Content-Type": "application/x-npz", "X-Request-Timeout": "60"}
    answer = httpx.post(
        own.url + "/dequantize", params={"model": "audio-test"}, content=body(), headers=headers, timeout=300
    )
    assert reloaded.is_set()
    assert (answer.status_code, len(answer.json()["clips"][0]["latents"])) == (200, 3)


def test_a_mean_takes_no_more_room_than_it_has_numbers_and_what_never_finds_room_is_too_large(own: Server) -> None:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(60 * 16_000) / 20), 16_000, format="FLAC")
    found = [
        httpx.post(own.url + "/encode", params={"pool": pool}, content=file.getvalue(), timeout=300)
        for pool in ("mean", "none")
    ]
    assert [answer.status_code for answer in found] == [200, 413]
    assert len(found[0].json()["clips"][0]["embedding"]) == found[0].json()["clips"][0]["width"]
    assert "max_queue_bytes is 1000000" in found[1].json()["detail"]


def test_answers_take_room_while_they_come_and_not_when_all_are_there(own: Server) -> None:
    file, before = io.BytesIO(), own.metric("bridle_serve_clips_total")
    soundfile.write(file, np.zeros(60 * 16_000), 16_000, format="FLAC")
    files = [("file", file.getvalue())] * 32
    headers = {"Accept": "application/x-npz"}
    answer = httpx.post(own.url + "/encode", params={"pool": "none"}, files=files, headers=headers, timeout=300)
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:bridle:problem:too-large")
    assert own.metric("bridle_serve_clips_total") - before < 32 * 60 / 2
    assert own.metric("bridle_serve_upload_bytes") == 0
