"""Whatever a request holds, no callback keeps the event loop: each runs inside the service, watched."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from running_service import Server, serving

LONGEST = 0.020
"""Seconds of CPU that a callback may take the loop's thread: 10 ms of a quiet machine, where others use the caches."""
TRIES = 3
"""A callback that keeps the loop keeps it each time; a page fault or a guest that waits for its host comes once."""
JSON, NPZ, ARROW = "application/json", "application/x-npz", "application/vnd.apache.arrow.stream"
FORM = "multipart/form-data; boundary=b"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path, image_folder: Path) -> Iterator[Server]:
    program = (str(Path(__file__).with_name("watched_service.py")),)
    folder = tmp_path_factory.mktemp("watched")
    with serving(folder, audio_folder, image_folder, program=program, max_clips=500, max_queue=500) as running:
        yield running


def npz(*arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for index, array in enumerate(arrays):
            with out.open(f"codes_{index}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    return file.getvalue()


def form(*files: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--b--\r\n"


def codes_as_json(rows: int, width: int) -> bytes:
    return b'{"clips":[{"codes":[' + b",".join([b"[" + b",".join([b"1"] * width) + b"]"] * rows) + b"]}]}"


Attack = Callable[[list[bytes], list[bytes]], tuple[str, bytes, dict[str, str], int]]
ATTACKS: dict[str, Attack] = {
    "a hundred thousand tiny clips": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        b'{"clips":[' + b",".join([b'{"codes":[[1]]}'] * 100_000) + b"]}",
        {"Content-Type": JSON},
        413,
    ),
    "as many clips as are taken": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        b'{"clips":[' + b",".join([b'{"codes":[[1]]}'] * 500) + b"]}",
        {"Content-Type": JSON},
        200,
    ),
    "half a million lists": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        b'{"clips":[{"codes":[' + b",".join([b"[]"] * 500_000) + b"]}]}",
        {"Content-Type": JSON},
        422,
    ),
    "two megabytes of codes": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        codes_as_json(4, 250_000),
        {"Content-Type": JSON, "Accept": NPZ},
        200,
    ),
    "latents as JSON": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        codes_as_json(1, 60_000),
        {"Content-Type": JSON},
        200,
    ),
    "an NPZ that unfolds to 128 MB": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        npz(np.zeros((1, 1_000_000), np.int64)),
        {"Content-Type": NPZ, "Accept": NPZ},
        200,
    ),
    "a small NPZ that unfolds to too much": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        npz(np.zeros((1, 2_400_000), np.int64)),
        {"Content-Type": NPZ},
        413,
    ),
    "an NPZ of many arrays": lambda sounds, pictures: (
        "/dequantize?modality=audio",
        npz(*[np.ones((1, 1), np.int64)] * 400),
        {"Content-Type": NPZ, "Accept": ARROW},
        200,
    ),
    "many files": lambda sounds, pictures: (
        "/tokenize?layout=delay&text=true",
        form(*pictures * 40),
        {"Content-Type": FORM},
        200,
    ),
    "five hundred files that are none": lambda sounds, pictures: (
        "/tokenize",
        form(*[b"RIFF"] * 500),
        {"Content-Type": FORM},
        415,
    ),
    "parts with headers": lambda sounds, pictures: (
        "/tokenize",
        b"".join(b"--b\r\n" + b"X-H: 1\r\n" * 7 + b"\r\n\r\n" for _ in range(50_000)),
        {"Content-Type": FORM},
        422,
    ),
    "a large body": lambda sounds, pictures: ("/tokenize", b"RIFF" + bytes(60_000_000), {}, 415),
    "a boundary that nearly comes": lambda sounds, pictures: (
        "/tokenize",
        form(b"\r\n--" * 4_000_000),
        {"Content-Type": FORM},
        415,
    ),
    "a packed body": lambda sounds, pictures: (
        "/tokenize",
        gzip.compress(bytes(60_000_000)),
        {"Content-Encoding": "gzip"},
        415,
    ),
    "a bomb": lambda sounds, pictures: (
        "/tokenize",
        gzip.compress(bytes(300_000_000)),
        {"Content-Encoding": "gzip"},
        413,
    ),
    "a long sound": lambda sounds, pictures: ("/encode?pool=none", minutes(20), {"Accept": NPZ}, 200),
    "a long sound's text": lambda sounds, pictures: ("/tokenize?layout=delay&text=true", minutes(20), {}, 200),
    "a long sound's lines": lambda sounds, pictures: (
        "/tokenize",
        minutes(20),
        {"Accept": "application/x-ndjson"},
        200,
    ),
}


def minutes(count: int) -> bytes:
    """A WAV of noise, 8 kHz."""
    import soundfile

    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(-9000, 9000, count * 60 * 8000, np.int16)
    soundfile.write(file, noise, 8000, format="WAV", subtype="PCM_16")
    return file.getvalue()


@pytest.mark.parametrize("name", ATTACKS)
def test_no_callback_keeps_the_loop(watched: Server, sounds: list[bytes], pictures: list[bytes], name: str) -> None:
    path, body, headers, status = ATTACKS[name](sounds, pictures)
    for _ in range(TRIES):
        seen = watched.out.stat().st_size
        answer = httpx.post(watched.url + path, content=body, headers=headers, timeout=120)
        lines = watched.out.read_bytes()[seen:].decode().splitlines()
        print(name, len(body), max(lines, default="nothing told"))
        assert answer.status_code == status, answer.text[:300]
        if not (kept := [line for line in lines if float(line.split()[0]) > LONGEST]):
            break
    assert not kept
