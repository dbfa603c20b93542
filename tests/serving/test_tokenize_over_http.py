"""Codes over HTTP equal the library's, in every format, alone and in company."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from running_service import Server, serving
from small_models import sample_files, write_model

import bridle
from bridle.model_folder import BridleModel
from bridle.tokens.layouts import LAYOUTS, Vocabulary, from_text

NPZ, ARROW, NDJSON = "application/x-npz", "application/vnd.apache.arrow.stream", "application/x-ndjson"


def files(contents: list[bytes]) -> list[tuple[str, bytes]]:
    return [("file", content) for content in contents]


def expected(model: BridleModel, content: bytes) -> list[list[int]]:
    codes: list[list[int]] = model.tokenize(content).codes.T.tolist()
    return codes


def test_codes_equal_the_librarys_for_a_raw_body_and_many_parts(
    client: httpx.Client, sounds: list[bytes], pictures: list[bytes], audio_model: BridleModel, image_model: BridleModel
) -> None:
    for content in (sounds[0], sounds[5]):
        (clip,) = client.post("/tokenize", content=content).raise_for_status().json()["clips"]
        stream = audio_model.tokenize(content)
        assert clip["codes"] == stream.codes.T.tolist()
        assert clip["grid"] == stream.grid
        assert clip["duration_s"] == stream.duration_s
        assert (clip["codebooks"], clip["codebook_size"]) == (4, 32)
        assert (clip["model"], clip["modality"]) == ("audio-test", "audio")
    mixed = [sounds[1], pictures[0], sounds[2], pictures[1]]
    clips = client.post("/tokenize", files=files(mixed)).raise_for_status().json()["clips"]
    models = [audio_model, image_model, audio_model, image_model]
    assert [clip["codes"] for clip in clips] == [expected(m, c) for m, c in zip(models, mixed, strict=True)]
    assert clips[1]["duration_s"] is None


def test_codes_in_bfloat16_equal_the_librarys(tmp_path: Path, audio_folder: Path, sounds: list[bytes]) -> None:
    model = bridle.load(audio_folder, dtype="bfloat16")
    with serving(tmp_path, audio_folder, dtype="bfloat16") as server:
        assert httpx.get(server.url + "/v1/models", timeout=60).json()["data"][0]["dtype"] == "bfloat16"
        for sound in sounds[:4]:
            (clip,) = httpx.post(server.url + "/tokenize", content=sound, timeout=60).json()["clips"]
            assert clip["codes"] == model.tokenize(sound).codes.T.tolist()


@pytest.mark.slow
def test_a_compiled_model_is_ready_when_it_says_so(tmp_path: Path, sounds: list[bytes]) -> None:
    """Of one block: each costs torch half a minute."""
    folder = write_model(tmp_path / "shallow", settings=["model.encoder.depth=1"])
    shallow, recompiled = bridle.load(folder), "Recompiling function"
    with serving(tmp_path, folder, compile=True, log_level="debug", env={"TORCH_LOGS": "recompiles"}) as server:
        before = sum(recompiled in line["event"] for line in server.lines())
        assert before > 0
        same = []
        for many in (sounds[:1], sounds[:2], sounds[:8]):
            answer = httpx.post(server.url + "/tokenize", files=files(many), timeout=60).raise_for_status()
            pairs = zip(answer.json()["clips"], many, strict=True)
            same += [np.mean(np.array(clip["codes"]) == np.array(expected(shallow, data))) for clip, data in pairs]
        httpx.post(server.url + "/encode", files=files(sounds[:3]), timeout=60).raise_for_status()
        assert np.mean(same) > 0.99  # fused operators round otherwise: a tie may fall the other way
        assert sum(recompiled in line["event"] for line in server.lines()) == before
    assert "error" not in {line["level"] for line in server.lines()}


def test_codes_are_equal_under_load(
    server: Server, sounds: list[bytes], pictures: list[bytes], audio_model: BridleModel, image_model: BridleModel
) -> None:
    contents = sounds + pictures
    wanted = [expected(audio_model, c) for c in sounds] + [expected(image_model, c) for c in pictures]

    async def load() -> list[tuple[int, list[list[int]]]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def one(index: int) -> tuple[int, list[list[int]]]:
                answer = await client.post("/tokenize", content=contents[index])
                return index, answer.raise_for_status().json()["clips"][0]["codes"]

            order = np.random.default_rng(0).permutation(3 * len(contents)) % len(contents)
            return list(await asyncio.gather(*(one(int(index)) for index in order)))

    for index, codes in asyncio.run(load()):
        assert codes == wanted[index]
    assert server.metric("bridle_serve_batch_size_sum") > server.metric("bridle_serve_batch_size_count")


def test_npz_and_arrow_hold_the_same_codes_and_ids(
    client: httpx.Client, sounds: list[bytes], audio_model: BridleModel
) -> None:
    parameters = {"layout": "delay", "offset": 1000}
    json_clips = client.post("/tokenize", files=files(sounds[:3]), params=parameters).json()["clips"]
    npz = client.post("/tokenize", files=files(sounds[:3]), params=parameters, headers={"Accept": NPZ})
    assert npz.headers["content-type"] == NPZ
    arrays = np.load(io.BytesIO(npz.content), allow_pickle=False)
    about = json.loads(str(arrays["clips"]))
    arrow = client.post("/tokenize", files=files(sounds[:3]), params=parameters, headers={"Accept": ARROW})
    rows = pa.ipc.open_stream(arrow.content).read_all().to_pylist()
    for index, clip in enumerate(json_clips):
        assert clip["codes"] == expected(audio_model, sounds[index])
        assert arrays[f"codes_{index}"].tolist() == clip["codes"] == rows[index]["codes"]
        assert arrays[f"ids_{index}"].tolist() == clip["ids"] == rows[index]["ids"]
        assert about[index]["grid"] == clip["grid"] == dict(rows[index]["grid"])
        assert about[index]["duration_s"] == clip["duration_s"] == rows[index]["duration_s"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_text_lead_back_to_the_codes(client: httpx.Client, sounds: list[bytes], layout: str) -> None:
    parameters = {"layout": layout, "offset": 32_000, "text": "true"}
    (clip,) = client.post("/tokenize", content=sounds[0], params=parameters).raise_for_status().json()["clips"]
    vocabulary = Vocabulary(4, 32, 32_000)
    assert vocabulary.unflatten(clip["ids"], layout).T.tolist() == clip["codes"]
    modality, codes = from_text(clip["text"], vocabulary, layout)
    assert modality == "audio"
    assert codes.T.tolist() == clip["codes"]


def test_windows_come_one_by_one_and_join_to_the_whole(
    client: httpx.Client, sounds: list[bytes], audio_model: BridleModel
) -> None:
    content = max(sounds, key=lambda sound: len(audio_model.tokenize(sound).starts_s))
    stream = audio_model.tokenize(content)
    with client.stream("POST", "/tokenize", content=content, headers={"Accept": NDJSON}) as answer:
        assert answer.status_code == 200
        lines = [json.loads(line) for line in answer.iter_lines()]
    windows, end = lines[:-1], lines[-1]
    assert len(windows) == len(stream.starts_s) > 1
    assert [line["start_s"] for line in windows] == stream.starts_s
    joined = np.concatenate([np.array(line["codes"]) for line in windows], axis=1)
    assert (stream.codes.numpy() == joined.T).all()
    assert end == {"clip": 0, "end": True, "windows": len(windows), "duration_s": stream.duration_s}


def test_embeddings_equal_the_librarys(client: httpx.Client, sounds: list[bytes], audio_model: BridleModel) -> None:
    wanted = audio_model.encode(sounds[0]).numpy()
    (clip,) = client.post("/encode", content=sounds[0], params={"pool": "none"}).raise_for_status().json()["clips"]
    assert np.abs(np.array(clip["embeddings"], np.float32) - wanted).max() < 1e-5
    binary = client.post("/encode", content=sounds[0], params={"pool": "none"}, headers={"Accept": NPZ})
    assert np.abs(np.load(io.BytesIO(binary.content))["embeddings_0"] - wanted).max() < 1e-5
    (clip,) = client.post("/encode", content=sounds[0]).raise_for_status().json()["clips"]
    assert np.allclose(clip["embedding"], wanted.mean(0), atol=1e-6)
    rows = client.post("/encode", content=sounds[0], headers={"Accept": ARROW})
    (row,) = pa.ipc.open_stream(rows.content).read_all().to_pylist()
    assert np.allclose(row["embedding"], wanted.mean(0), atol=1e-6)


@pytest.mark.parametrize("kept", [1, 4])
def test_dequantize_equals_the_librarys(
    client: httpx.Client, sounds: list[bytes], audio_model: BridleModel, kept: int
) -> None:
    codes = audio_model.tokenize(sounds[0]).codes[:, :kept]
    wanted = audio_model.dequantize(codes).numpy()
    body = {"clips": [{"codes": codes.T.tolist()}, {"codes": codes[:5].T.tolist()}]}
    clips = client.post("/dequantize?modality=audio", json=body).raise_for_status().json()["clips"]
    assert (np.array(clips[0]["latents"], np.float32) == wanted).all()
    assert (np.array(clips[1]["latents"], np.float32) == wanted[:5]).all()
    file = io.BytesIO()
    np.savez_compressed(file, codes=codes.T.numpy())
    headers = {"Content-Type": NPZ, "Accept": NPZ}
    answer = client.post("/dequantize?modality=audio", content=file.getvalue(), headers=headers).raise_for_status()
    assert (np.load(io.BytesIO(answer.content))["latents_0"] == wanted).all()


def test_info_says_what_is_loaded(client: httpx.Client, audio_model: BridleModel) -> None:
    info = client.get("/info").json()
    assert info["limits"]["max_clips"] == 8
    audio = next(model for model in info["models"] if model["modality"] == "audio")
    assert audio["sha256"] == audio_model.sha256
    assert audio["codes_depend_on_batch"] is False
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["audio-test", "image-test"]
    metrics = client.get("/metrics").text
    for name in ("requests_total", "queue_seconds_bucket", "batch_size_bucket", "model_seconds_bucket", "build_info"):
        assert f"bridle_serve_{name}" in metrics
    answer = client.get("/info", headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"


def test_the_picture_for_people_is_a_png(client: httpx.Client, sounds: list[bytes], pictures: list[bytes]) -> None:
    for content in (sounds[0], pictures[0]):
        answer = client.post("/v1/picture", content=content).raise_for_status()
        assert answer.content.startswith(b"\x89PNG")
        assert answer.headers["x-bridle-frames"] == "1"


def test_a_film_of_several_windows_has_the_codes_of_all(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "video")
    film = max(sample_files("video", ("mp4",), 20), key=len)
    stream = bridle.load(model).tokenize(film)
    with serving(tmp_path, model, decode_workers=1) as server:
        (clip,) = httpx.post(f"{server.url}/tokenize", content=film, timeout=60).raise_for_status().json()["clips"]
    assert len(list(bridle.load(model).modality.windows(film))) > 1
    assert clip["codes"] == stream.codes.T.tolist()
    assert clip["grid"] == stream.grid
