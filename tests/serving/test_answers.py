"""Large answers: the same as small ones, made while they are read, no whole ones where they break off."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import zipfile
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from running_service import Server
from starlette.requests import Request

from serving.engine.deployment import Deployment
from serving.engine.errors import ProcessEndedError
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web import middleware
from serving.web.answers import JSON, NPZ, streamed
from serving.web.formats import Clip, Later, arrow_body, json_body, json_parts, members, npz_length, npz_parts
from serving.web.middleware import Around
from serving.web.problems import ProblemError
from serving.web.service import Service

ABOUT: Clip = {"model": "a", "modality": "audio", "grid": {"time": 2, "frequency": 3}, "duration_s": None}
RANDOM = np.random.default_rng(0)
LATENTS = RANDOM.standard_normal((3001, 16)).astype(np.float32)
CLIPS: dict[str, list[Clip]] = {
    "several": [ABOUT | {"codes": RANDOM.integers(0, 9, (4, n)).astype(np.int32)} for n in (7, 9)],
    "long rows": [ABOUT | {"codes": RANDOM.integers(0, 9, (2, 20_003)), "ids": np.arange(40_006)}],
    "long text": [ABOUT | {"codes": np.zeros((1, 1), np.int32), "text": '<|"ä\n|>' * 40_000}],
    "floats": [ABOUT | {"embeddings": LATENTS}],
    "the other order": [ABOUT | {"codes": RANDOM.integers(0, 9, (30_001, 2)).T}],
    "no numbers": [ABOUT | {"codes": np.zeros((4, 0), np.int32)}],
    "no rows": [ABOUT | {"codes": np.zeros((0, 4), np.int32)}],
}


def later(array: np.ndarray, asked: list[int] | None = None, step: int = 999) -> Later:
    async def blocks() -> AsyncGenerator[np.ndarray, None]:
        for start in range(0, len(array), step):
            if asked is not None:
                asked.append(start)
            yield array[start : start + step]

    return Later(array.shape, blocks())


async def all_of(parts: AsyncGenerator[Any, None]) -> bytes:
    return b"".join([part async for part in parts])


@pytest.mark.parametrize("name", CLIPS)
def test_json_in_parts_is_what_json_says(name: str) -> None:
    clips = CLIPS[name]
    text = asyncio.run(all_of(json_parts(clips)))
    assert text == json_body(clips)
    for clip, found in zip(clips, json.loads(text)["clips"], strict=True):
        rounded = {key: np.float32(value).tolist() if key == "embeddings" else value for key, value in found.items()}
        assert rounded == {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in clip.items()}


@pytest.mark.parametrize("name", CLIPS)
def test_an_npz_in_parts_has_the_length_that_was_told_and_the_same_arrays(name: str) -> None:
    arrays = members(CLIPS[name])
    data = asyncio.run(all_of(npz_parts(arrays)))
    assert len(data) == npz_length(arrays)
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    found = np.load(io.BytesIO(data))
    assert set(found) == set(arrays)
    for key, value in arrays.items():
        assert isinstance(value, np.ndarray)
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype)
        assert (found[key] == value).all()


@pytest.mark.parametrize("name", CLIPS)
def test_arrow_has_a_row_a_clip(name: str) -> None:
    rows = pa.ipc.open_stream(arrow_body(CLIPS[name])).read_all().to_pylist()
    for row, clip in zip(rows, CLIPS[name], strict=True):
        plain = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in clip.items()}
        assert row == plain | {"grid": list(clip["grid"].items())}


def test_arrays_for_later_are_written_as_those_that_are_there() -> None:
    both = [ABOUT | {"latents": LATENTS}] * 2
    assert asyncio.run(all_of(json_parts([ABOUT | {"latents": later(LATENTS)} for _ in both]))) == json_body(both)
    arrays = members([ABOUT | {"latents": later(LATENTS)} for _ in both])
    data = asyncio.run(all_of(npz_parts(arrays)))
    assert len(data) == npz_length(arrays)
    found = np.load(io.BytesIO(data))
    assert (found["latents_0"] == LATENTS).all() and (found["latents_1"] == LATENTS).all()


# While they are read.


class Connection:
    """What a server gives an application: a client that takes so many pieces of an answer, and then no more."""

    def __init__(self, takes: int, version: str = "1.1") -> None:
        self.sent: list[dict[str, Any]] = []
        self.full = asyncio.Event()
        self._takes = takes
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "http_version": version}
        self.scope["state"] = {"request_id": "r"}

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(self, message: dict[str, Any]) -> None:
        if len(self.sent) > self._takes:
            self.full.set()
            await asyncio.sleep(60)
        self.sent.append(message)


@pytest.mark.parametrize("kind", [JSON, NPZ])
def test_a_piece_is_made_when_those_before_are_taken(kind: str) -> None:
    latents = np.tile(LATENTS, (20, 1))  # 60 pieces of 64 KB
    asked: list[int] = []

    async def run() -> None:
        connection = Connection(takes=5)
        clips = [ABOUT | {"latents": later(latents, asked, step=1000)}]
        response = await streamed(Request(connection.scope), clips, kind, {}, nullcontext())
        assert len(asked) == 1  # the first tells whether it can be made at all
        answering = asyncio.create_task(response(connection.scope, connection.receive, connection.send))
        await asyncio.wait_for(connection.full.wait(), 200)
        assert 1 < len(asked) <= 8
        answering.cancel()
        await asyncio.wait([answering])

    asyncio.run(run())
    assert len(asked) <= 8


def test_an_error_after_the_first_piece_breaks_off_and_ends_what_was_held() -> None:
    async def blocks() -> AsyncGenerator[np.ndarray, None]:
        yield LATENTS
        raise ProcessEndedError("the model process ended")

    held = []

    class Held(nullcontext[None]):
        def __exit__(self, *_: object) -> None:
            held.append("left")

    async def run(kind: str) -> None:
        connection = Connection(takes=1000)
        clips = [ABOUT | {"latents": Later((2 * len(LATENTS), 16), blocks())}]
        response = await streamed(Request(connection.scope), clips, kind, {}, Held())
        with pytest.raises(ProblemError, match="the model process ended"):
            await response(connection.scope, connection.receive, connection.send)
        assert all(message.get("more_body", True) for message in connection.sent)  # no end that looks like one
        assert len(b"".join(message.get("body", b"") for message in connection.sent)) > 32_000

    for kind in (JSON, NPZ):
        asyncio.run(run(kind))
    assert held == ["left"] * 2


def test_an_error_in_the_first_piece_is_told() -> None:
    async def blocks() -> AsyncGenerator[np.ndarray, None]:
        raise ProcessEndedError("the model process ended")
        yield LATENTS

    async def run(kind: str) -> None:
        clips = [ABOUT | {"latents": Later((2 * len(LATENTS), 16), blocks())}]
        with pytest.raises(ProcessEndedError):
            await streamed(Request(Connection(0).scope), clips, kind, {}, nullcontext())

    for kind in (JSON, NPZ):
        asyncio.run(run(kind))


def test_an_answer_that_is_made_slowly_is_not_the_readers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of a long file come as the model makes them; a client is too slow only while it is waited for."""
    now = 100.0
    monkeypatch.setattr(middleware.time, "monotonic", lambda: now)

    async def slowly(scope: Any, receive: Any, send: Any) -> None:
        nonlocal now
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(5):
            now += 60.0
            await send({"type": "http.response.body", "body": b"line\n", "more_body": number < 4})

    async def run(seconds_taken: float) -> list[dict[str, Any]]:
        nonlocal now
        connection = Connection(takes=1000)

        async def send(message: dict[str, Any]) -> None:
            nonlocal now
            now += seconds_taken
            await connection.send(message)

        service = Service(ServeSettings(models=("x",)))
        await Around(slowly, service, {"/": "open"})(connection.scope, connection.receive, send)
        return connection.sent

    sent = asyncio.run(run(0.0))
    assert b"".join(message.get("body", b"") for message in sent) == b"line\n" * 5
    cut = asyncio.run(run(3.0))
    assert b"".join(message.get("body", b"") for message in cut) == b"line\n"  # 6 s for the head and 5 bytes


def test_who_reads_an_old_models_answer_for_long_keeps_it_no_longer_than_a_request(audio_folder: Path) -> None:
    settings = ServeSettings(models=(str(audio_folder),), device=("cpu",), decode_workers=1, request_timeout=1.0)

    async def run() -> None:
        deployment = Deployment(audio_folder, settings, Metrics(), ["cpu"])
        await deployment.start()
        with deployment.used():
            await asyncio.wait_for(deployment.retire(), 300)
        assert not deployment.running

    asyncio.run(run())


# Over HTTP.


def test_large_answers_over_http_are_those_of_the_library(server: Server, client: httpx.Client) -> None:
    codes = RANDOM.integers(0, 8, (2, 40_000))
    about = client.get("/info").json()["models"][0]
    body = json.dumps({"clips": [{"codes": codes.tolist()}]})
    headers = {"Content-Type": "application/json"}
    url = f"/dequantize?model={about['id']}"
    text = client.post(url, content=body, headers=headers)
    assert (text.status_code, text.headers["transfer-encoding"]) == (200, "chunked")
    latents = np.array(text.json()["clips"][0]["latents"], np.float32)
    assert latents.shape == (40_000, about["dim"])
    packed = client.post(url, content=body, headers={**headers, "Accept": NPZ})
    assert int(packed.headers["content-length"]) == len(packed.content)
    assert (np.load(io.BytesIO(packed.content))["latents_0"] == latents).all()
    few = json.dumps({"clips": [{"codes": codes[:, 500:510].tolist()}]})
    small = client.post(url, content=few, headers=headers).json()["clips"][0]["latents"]
    assert (np.array(small, np.float32) == latents[500:510]).all()


def test_who_knows_no_chunks_is_told_the_length(server: Server) -> None:
    body = b'{"clips":[{"codes":[[' + b",".join([b"1"] * 40_000) + b"]]}]}"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        head = f"POST /dequantize?modality=audio HTTP/1.0\r\nHost: localhost\r\nContent-Type: {JSON}\r\n"
        sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        found = bytearray()
        while piece := sock.recv(1 << 16):
            found += piece
    head, _, text = bytes(found).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"content-length: %d" % len(text) in head.lower()
    assert len(json.loads(text)["clips"][0]["latents"]) == 40_000


def test_too_many_floats_for_json_are_refused_before_anything_is_made(server: Server, client: httpx.Client) -> None:
    made = server.metric("bridle_serve_clips_total")
    codes = np.zeros((1, 1_000_000), np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, codes=codes)
    answer = client.post("/dequantize?modality=audio", content=file.getvalue(), headers={"Content-Type": NPZ})
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:bridle:problem:too-large")
    assert "too many for JSON; send Accept: application/x-npz" in answer.json()["detail"]
    assert server.metric("bridle_serve_clips_total") == made
