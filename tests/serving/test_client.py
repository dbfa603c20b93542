"""The typed client: the same codes, sync and async, and patience with a busy service."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running_service import Server

from bridle.client import AsyncClient, Client, ServiceError
from bridle.model_folder import BridleModel


def test_no_files_have_no_codes_and_ask_nobody() -> None:
    async def ask() -> list[object]:
        async with AsyncClient("http://127.0.0.1:9", retries=0) as client:
            return [*await client.tokenize_many([])]

    with Client("http://127.0.0.1:9", retries=0) as client:
        assert client.tokenize_many([]) == asyncio.run(ask()) == []


def test_both_clients_give_the_librarys_answers(
    server: Server, sounds: list[bytes], audio_model: BridleModel, tmp_path: Path
) -> None:
    path = tmp_path / "sound"
    path.write_bytes(sounds[0])
    stream = audio_model.tokenize(path)
    latents = audio_model.dequantize(stream.codes).numpy()

    async def ask() -> tuple[object, ...]:
        async with AsyncClient(server.url) as client:
            clip = await client.tokenize(path, layout="delay", offset=5)
            windows = [window async for window in client.windows(path)]
            back = await client.dequantize(clip.codes, modality="audio")
            return clip, windows, back, await client.encode(path), await client.info()

    with Client(server.url) as client:
        clip = client.tokenize(path, layout="delay", offset=5)
        answers = (
            clip,
            list(client.windows(path)),
            client.dequantize(clip.codes, modality="audio"),
            client.encode(path),
            client.info(),
        )
        assert [one.model for one in client.tokenize_many([sounds[0], sounds[1]])] == ["audio-test"] * 2
    for found, windows, back, embedding, info in (answers, asyncio.run(ask())):
        assert (found.codes == stream.codes.T.numpy()).all()  # type: ignore[attr-defined]
        assert found.ids is not None  # type: ignore[attr-defined]
        assert (np.concatenate([w.codes for w in windows], 1) == stream.codes.T.numpy()).all()  # type: ignore[attr-defined]
        assert (back == latents).all()
        assert np.allclose(embedding, audio_model.encode(path).numpy().mean(0), atol=1e-5)  # type: ignore[arg-type]
        assert info["models"][0]["id"] == "audio-test"  # type: ignore[index]


def test_problems_are_raised_with_their_type(server: Server) -> None:
    with Client(server.url) as client:
        for ask in (lambda: client.tokenize(b"hello"), lambda: list(client.windows(b"hello"))):
            with pytest.raises(ServiceError, match="not recognised") as caught:
                ask()
            assert (caught.value.status, caught.value.type) == (415, "urn:bridle:problem:unsupported-kind")


@pytest.fixture
def busy_service() -> Iterator[tuple[str, list[float]]]:
    """Answers 429, then 503, then 200; notes when it was asked."""
    asked: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(time.monotonic())
            status = {1: 429, 2: 503}.get(len(asked), 404)
            self.send_response(status)
            if status != 404:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_a_busy_service_is_asked_again_when_it_said(
    busy_service: tuple[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, asked), pauses = busy_service, []
    monkeypatch.setattr("bridle.client.time", SimpleNamespace(sleep=lambda s: [pauses.append(s), time.sleep(s)]))
    with Client(url) as client, pytest.raises(ServiceError) as caught:
        client.tokenize(b"x")
    assert caught.value.status == 404
    assert len(asked) == 3
    assert all(later - sooner >= 1.0 for sooner, later in pairwise(asked))
    assert len(pauses) == 3 and max(pauses) < 3.0  # a busy machine sleeps longer
