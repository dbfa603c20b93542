"""Whatever is sent, the answer is problem JSON with the right 4xx; the service stays well."""

from __future__ import annotations

import io
import random
import socket
import struct
import time
import wave
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from running_service import Server

NPZ = "application/x-npz"
HELD = ("bridle_serve_queued", "bridle_serve_upload_bytes")


@pytest.fixture(autouse=True)
def stays_well(server: Server) -> Iterator[None]:
    """After every test here: still ready, no error in the log, nothing left in the queue."""
    yield
    assert httpx.get(server.url + "/readyz", timeout=30).status_code == 200
    assert [line for line in server.lines() if line["level"] == "error"] == []
    end = time.monotonic() + 60
    while any(map(server.metric, HELD)) and time.monotonic() < end:
        time.sleep(0.05)
    assert [server.metric(name) for name in HELD] == [0, 0]


def check_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"urn:bridle:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"] and problem["detail"] and problem["request_id"]
    assert "Traceback" not in answer.text
    return problem


def wav(seconds: float, value: float = 0.1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes((np.full(int(16000 * seconds), value) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def nan_wav() -> bytes:
    samples = np.full(16000, np.nan, "<f4").tobytes()
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)
    body = b"WAVE" + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def test_content_that_is_no_clip_is_refused_by_what_it_is(client: httpx.Client, sounds: list[bytes]) -> None:
    flac = next(sound for sound in sounds if sound.startswith(b"fLaC"))
    cases: list[tuple[bytes, int, str]] = [
        (b"", 400, "undecodable"),
        (b"hello", 415, "unsupported-kind"),
        (b"#EXTM3U\nhttp://127.0.0.1/x.mp3\n", 415, "unsupported-kind"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", 415, "unsupported-kind"),
        (flac[: len(flac) // 2], 400, "undecodable"),
        (flac[:100], 400, "undecodable"),
        (nan_wav(), 400, "undecodable"),
        (wav(61), 413, "too-large"),
        (huge_png(), 413, "too-large"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, 400, "undecodable"),
    ]
    for content, status, kind in cases:
        problem = check_problem(client.post("/tokenize", content=content), status, kind)
        assert problem["clip"] == 0
    answer = client.post("/tokenize", files=[("file", flac), ("file", b"RIFF1234WAVEnonsense")])
    assert check_problem(answer, 400, "undecodable")["clip"] == 1


def test_wrong_parameters_are_422_and_named(client: httpx.Client, sounds: list[bytes]) -> None:
    for query in (
        "model=none", "modality=smell", "layout=sideways", "offset=-1", "offset=x", "offset=9007199254740993",
        "text=perhaps", "modle=audio-test", "model=audio-test&modality=image", "model=",
    ):  # fmt: skip
        problem = check_problem(client.post(f"/tokenize?{query}", content=sounds[0]), 422, "wrong-parameter")
        assert len(problem["detail"]) < 1000
    for timeout in ("0", "-1", "nan", "inf", "soon", ""):
        answer = client.post("/tokenize", content=sounds[0], headers={"X-Request-Timeout": timeout})
        check_problem(answer, 422, "wrong-parameter")


def test_wrong_paths_methods_and_accepts_have_their_own_problems(client: httpx.Client, sounds: list[bytes]) -> None:
    check_problem(client.get("/nothing"), 404, "not-found")
    check_problem(client.get("/playground/..%2fapp.py"), 404, "not-found")
    check_problem(client.get("/playground/%2e%2e/app.py"), 404, "not-found")
    check_problem(client.get("/tokenize"), 405, "method-not-allowed")
    check_problem(client.post("/tokenize", content=sounds[0], headers={"Accept": "text/html"}), 406, "not-acceptable")
    check_problem(client.get("/info", headers={"Host": "evil.example"}), 403, "forbidden")
    check_problem(client.get("/info", headers={"Sec-Fetch-Site": "cross-site"}), 403, "forbidden")


def test_the_type_and_name_that_a_part_claims_do_not_matter(client: httpx.Client, sounds: list[bytes]) -> None:
    expected = client.post("/tokenize", content=sounds[0]).json()
    for kind in ("image/png", "text/html", "application/json"):
        answer = client.post("/tokenize", content=sounds[0], headers={"Content-Type": kind})
        assert answer.json() == expected
    part = ("file", ("../../etc/passwd\0.png", sounds[0], "image/png"))
    assert client.post("/tokenize", files=[part]).json() == expected
    check_problem(client.post("/tokenize?modality=image", content=sounds[0]), 415, "unsupported-kind")


def multipart(*parts: bytes, boundary: bytes = b"b", end: bytes = b"--b--\r\n") -> tuple[bytes, dict[str, str]]:
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + end
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}


def test_multipart_floods_and_damage_are_refused(client: httpx.Client, sounds: list[bytes]) -> None:
    head = b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    other = b'Content-Disposition: form-data; name="other"\r\n\r\nx'
    cases: list[tuple[tuple[bytes, dict[str, str]], int, str]] = [
        (multipart(*[head + b"x"] * 5000), 413, "too-large"),
        (multipart(b"X: y\r\n" * 5000 + head + b"x"), 400, "malformed"),
        (multipart(b"X: " + b"y" * 100_000 + b"\r\n\r\nx"), 400, "malformed"),
        (multipart(other), 422, "wrong-parameter"),
        (multipart(), 400, "malformed"),
        (multipart(head + sounds[0], end=b""), 400, "malformed"),
        (multipart(head), 400, "undecodable"),
        ((b"\r\n" * 500_000, multipart()[1]), 400, "malformed"),
        ((b"x" * 500_000, multipart()[1]), 400, "malformed"),
        ((multipart(head + b"x")[0], {"Content-Type": "multipart/form-data"}), 400, "malformed"),
        ((b"x", {"Content-Type": "multipart/form-data; boundary=" + "b" * 5000}), 400, "malformed"),
        ((b"x", {"Content-Type": "multipart/mixed; boundary=b"}), 415, "unsupported-kind"),
    ]
    for (body, headers), status, kind in cases:
        began = time.monotonic()
        check_problem(client.post("/tokenize", content=body, headers=headers), status, kind)
        assert time.monotonic() - began < 30


def test_bodies_over_the_limit_are_refused_whether_announced_or_not(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(100_000)

    check_problem(client.post("/tokenize", content=bytes(4_000_001)), 413, "too-large")
    check_problem(client.post("/tokenize", content=chunks()), 413, "too-large")


def raw(server: Server, *pieces: bytes, pause: float = 0.0, patience: float = 60.0) -> bytes:
    """Sends bytes as they are, then reads until the service closes or `patience` is over."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=patience) as sock:
        got = b""
        try:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
            while data := sock.recv(65536):
                got += data
        except (TimeoutError, ConnectionError):
            pass
        return got


def test_lies_about_length_and_broken_http_end_in_an_answer(server: Server, sounds: list[bytes]) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    over = raw(server, head + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 1000)
    assert over.startswith(b"HTTP/1.1 413")
    assert raw(server, head + b"Content-Length: -5\r\n\r\nx").startswith(b"HTTP/1.1 400")
    both = head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert raw(server, both).startswith(b"HTTP/1.1 400")
    assert raw(server, head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n").startswith(b"HTTP/1.1 400")
    assert raw(server, b"\x16\x03\x01\x02\x00 not http at all\r\n\r\n").startswith(b"HTTP/1.1 400")
    flood = raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Filler: y\r\n" * 20_000)
    assert flood == b"" or flood.startswith(b"HTTP/1.1 431")
    short = raw(server, head + b"Content-Length: %d\r\n\r\n" % (len(sounds[0]) - 10) + sounds[0])
    assert short.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


def dequantize(client: httpx.Client, body: bytes, kind: str = NPZ) -> httpx.Response:
    return client.post("/dequantize?modality=audio", content=body, headers={"Content-Type": kind})


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return file.getvalue()


def array_file(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def test_npz_bombs_pickles_and_lies_are_refused(client: httpx.Client) -> None:
    good = array_file(np.zeros((4, 10), np.int64))
    lying = good.replace(b"(4, 10)", b"(4, 99999999999999)")[: len(good)]
    cases = [
        (b"no zip", 400, "malformed"),
        (archive({"codes.npy": good})[:-30], 400, "malformed"),
        (archive({"codes.npy": bytes(300_000_000)}), 413, "too-large"),
        (archive({"codes.npy": lying}), 400, "malformed"),
        (archive({f"codes_{i}.npy": good for i in range(2000)}), 413, "too-large"),
        (archive({f"codes_{i}.npy": good for i in range(20)}), 413, "too-large"),
        (archive({"codes.npy": array_file(np.array([{}], object), allow_pickle=True)}), 422, "wrong-parameter"),
        (archive({"codes.npy": array_file(np.zeros((4, 10)))}), 422, "wrong-parameter"),
        (archive({"codes.npy": array_file(np.zeros((5, 10), np.int64))}), 422, "wrong-parameter"),
        (archive({"codes.npy": array_file(np.full((4, 10), 32))}), 422, "wrong-parameter"),
        (archive({"codes.npy": array_file(np.full((4, 10), -1))}), 422, "wrong-parameter"),
        (archive({"codes.npy": array_file(np.full((4, 10), 2**64 - 1, np.uint64))}), 422, "wrong-parameter"),
        (archive({"../codes.npy": good}), 422, "wrong-parameter"),
        (archive({"codes.npy": good}, zipfile.ZIP_LZMA), 400, "malformed"),
        (archive({}), 422, "wrong-parameter"),
    ]
    for body, status, kind in cases:
        check_problem(dequantize(client, body), status, kind)
    assert dequantize(client, archive({"codes.npy": good})).status_code == 200


def test_bad_json_codes_are_refused(client: httpx.Client) -> None:
    cases = [
        (b"", 400), (b"{", 400), (b"[" * 100_000, 400), (b'{"clips":' * 50_000, 400), (b"\xff\xfe", 400),
        (b'{"\xbaodes": []}', 400), (b'{"clips": [{"co\x8ees": [[1]]}]}', 400), (b'{"clips": [[{"\xff": 1}]]}', 400),
        (b'{"clips": [{"codes": [[NaN]]}]}', 400), (b'{"clips": [{"codes": [[%s]]}]}' % (b"9" * 10_000), 400),
        (b"[]", 422), (b"{}", 422), (b'{"clips": []}', 422), (b'{"clips": [{"codes": []}]}', 422),
        (b'{"clips": [{"codes": [[]]}]}', 422), (b'{"clips": [{"codes": [[1, 2], [3]]}]}', 422),
        (b'{"clips": [{"codes": [[1.5]]}]}', 422), (b'{"clips": [{"codes": [[true]]}]}', 422),
        (b'{"clips": [{"codes": [["1"]]}]}', 422), (b'{"clips": [{"codes": [[32]]}]}', 422),
        (b'{"clips": [{"codes": [[-1]]}]}', 422), (b'{"clips": [{"codes": [[%d]]}]}' % 2**70, 422),
        (b'{"clips": [{"codes": [[1]], "more": 1}]}', 422), (b'{"clips": [{"codes": [[[1]]]}]}', 422),
    ]  # fmt: skip
    for body, status in cases:
        kind = "malformed" if status == 400 else "wrong-parameter"
        check_problem(dequantize(client, body, "application/json"), status, kind)
    check_problem(dequantize(client, b" " * 3_000_000, "application/json"), 413, "too-large")
    check_problem(dequantize(client, b"x", "text/plain"), 415, "unsupported-kind")
    answer = client.post("/dequantize", json={"clips": [{"codes": [[1]]}]})
    assert "2 models are loaded; say which" in check_problem(answer, 422, "wrong-parameter")["detail"]


def mutations(contents: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Real files with bytes changed, cut, doubled or joined."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(contents))
        for _ in range(rng.choice((1, 3, 30))):
            place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))
            data[place] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(1, len(data)) :]
        yield bytes(data) if rng.random() < 0.9 else bytes(data) + rng.choice(contents)


def test_mutated_files_never_make_a_5xx(client: httpx.Client, sounds: list[bytes], pictures: list[bytes]) -> None:
    seen = set()
    for data in mutations(sounds + pictures, 60, seed=7):
        answer = client.post("/tokenize", content=data)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 413, 415), (answer.status_code, answer.text)
    assert {200, 400} <= seen
