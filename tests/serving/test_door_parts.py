"""Keys, NPZ files and bodies by themselves: what opens, what is refused, where the limits are."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from bridle.settings import RecipeError
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web import keys
from serving.web.admission import Admission
from serving.web.keys import KeyRing, new_key, parse_keys, presented_key
from serving.web.npz import MAX_DIRECTORY, read_npz, write_npz
from serving.web.problems import ProblemError
from serving.web.uploads import Uploads


def refused(kind: str) -> Any:
    return pytest.raises(ProblemError, check=lambda error: error.type == kind)


# Keys.


def test_a_key_is_known_by_its_line_and_by_nothing_else() -> None:
    key, line = new_key("ci", ("use", "metrics"))
    ring = KeyRing(ServeSettings(models=("x",), api_keys=f"{line},{new_key('other')[1]}"))
    found = ring.find(key)
    assert ring.needed and found is not None
    assert (found.name, found.scopes) == ("ci", {"use", "metrics"})
    assert ring.find(key + "x") is ring.find("") is ring.find(line) is None
    assert line == f"ci:use+metrics:{hashlib.sha256(key.encode()).hexdigest()}"
    assert len(key) == len("bridle_") + 43  # 256 bits in base64
    assert key not in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no key"),
        ("# only words\n\n", "holds no key"),
        ("a:use:123", "64 hex digits"),
        ("a:root:" + "0" * 64, "'root'"),
        ("a:use+root+boot:" + "0" * 64, "'boot'"),
        ("a:use:" + hashlib.sha256(b"").hexdigest(), "empty key"),
        ("a:use:" + "0" * 64 + "\na:use:" + "1" * 64, "one name"),
    ],
)
def test_lines_that_are_no_keys_are_told(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_keys(text, "the file")


def test_a_keys_file_is_read_again_when_it_changes_and_kept_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    (old, old_line), (new, new_line), file = new_key("old"), new_key("new"), tmp_path / "keys"
    file.write_text(old_line)
    ring = KeyRing(ServeSettings(models=("x",), api_keys_file=str(file)))
    ring.refresh()
    file.write_text(f"# changed\n{new_line}\n")
    now += 0.5
    ring.refresh()
    assert ring.find(old) and not ring.find(new)  # looks at most once a second
    now += 0.5
    ring.refresh()
    assert ring.find(new) and not ring.find(old)
    file.write_text(f"{old_line}\n\n")
    now += 0.5
    ring.refresh()
    assert ring.find(new) and not ring.find(old)
    now += 0.5
    ring.refresh()
    assert ring.find(old)
    file.write_text(f"# and back\n{new_line}\n")
    ring.reload()
    assert ring.find(new)
    file.write_text("damaged, and longer than before " * 9)
    now += 1.5
    with pytest.raises(RecipeError):
        ring.refresh()
    now += 1.5
    ring.refresh()  # once per change
    assert ring.find(new)


def test_a_key_is_read_from_each_place_that_may_hold_it() -> None:
    basic = base64.b64encode(b"any:k:1").decode()
    cases = [
        ({"authorization": "Bearer k"}, "k"), ({"authorization": "bearer  k "}, "k"),
        ({"authorization": "Bearer"}, None),
        ({"authorization": f"Basic {basic}"}, "k:1"), ({"authorization": "Basic !!"}, None),
        ({"authorization": "Basic " + base64.b64encode(b"any:").decode()}, None),
        ({"authorization": f"Basic {basic[:4]}!{basic[4:]}"}, None), ({"authorization": "Basic \u00e4"}, None),
        ({"x-api-key": "k"}, "k"), ({"x-api-key": ""}, None), ({}, None), ({"authorization": "Digest k"}, None),
    ]  # fmt: skip
    for headers, key in cases:
        assert presented_key(headers) == key, headers


# NPZ.


def test_npz_comes_back_as_it_was_in_both_orders() -> None:
    arrays = {"a": np.arange(12, dtype=np.int32).reshape(3, 4), "b": np.asfortranarray(np.arange(6).reshape(2, 3))}
    found = read_npz(write_npz(arrays), max_arrays=2, max_numbers=18)
    assert found.keys() == arrays.keys()
    assert all((found[name] == arrays[name]).all() and found[name].dtype == arrays[name].dtype for name in arrays)


def test_npz_limits_are_exact() -> None:
    data = write_npz({f"codes_{i}": np.zeros((1, 100_000), np.int64) for i in range(3)})
    assert len(read_npz(data, max_arrays=3, max_numbers=300_000)) == 3
    with refused("too-large"):
        read_npz(data, max_arrays=2, max_numbers=300_000)
    with refused("too-large"):
        read_npz(data, max_arrays=3, max_numbers=290_000)


def test_npz_of_other_things_is_refused() -> None:
    def archive(name: str, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", kind) as out:
            out.writestr(name, content)
        return file.getvalue()

    def array(value: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.lib.format.write_array(file, value, allow_pickle=True)
        return file.getvalue()

    good = array(np.zeros((2, 5), np.int64))
    for content, kind in (
        (b"", "malformed"),
        (archive("a.npy", good)[:-30], "malformed"),
        (archive("a.npy", b"no array"), "malformed"),
        (archive("a.npy", good[:-1]), "malformed"),
        (archive("a.npy", good + b"x"), "malformed"),
        (archive("a.npy", good.replace(b"(2, 5)", b"(-2,5)")), "malformed"),
        (archive("a.npy", good, zipfile.ZIP_BZIP2), "malformed"),
        (archive("a.npy", array(np.zeros(2))), "wrong-parameter"),
        (archive("a.npy", array(np.array([{}], object))), "wrong-parameter"),
        (archive("a.npy" + "x" * (MAX_DIRECTORY - 20), good), "too-large"),
    ):
        with refused(kind):
            read_npz(content, max_arrays=4, max_numbers=1000)


# Bodies.


def uploads(pieces: list[bytes], pause: float = 0.0, **options: Any) -> tuple[list[bytes], Admission]:
    """What arrives of a body that comes in pieces, and the books afterwards."""
    headers: dict[str, str] = options.pop("headers", {})
    settings = ServeSettings(models=("x",), **options)
    metrics = Metrics()
    admission = Admission(settings, metrics)
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": pairs}, receive)
    places = admission.places("a")
    found = asyncio.run(Uploads(settings, metrics).files(request, places, time.monotonic() + 30))
    assert (places.files, places.bytes >= sum(map(len, found))) == (len(found), True)
    return [bytes(file) for file in found], admission


def test_a_body_is_read_up_to_its_limit_and_not_a_byte_more() -> None:
    assert uploads([b"a" * 60, b"b" * 40], max_bytes=100)[0] == [b"a" * 60 + b"b" * 40]
    for pieces, headers in (([b"a" * 60, b"b" * 41], {}), ([b"a"], {"Content-Length": "101"})):
        with refused("too-large"):
            uploads(pieces, max_bytes=100, headers=headers)
    with refused("undecodable") as found:
        uploads([b""])
    assert found.value.extra == {"clip": 0}
    with refused("too-large"):  # to wait would not help
        uploads([b"a" * 60], max_queue_bytes=59)


def test_packed_bodies_count_unfolded() -> None:
    packed = {"Content-Encoding": "gzip"}
    assert uploads([gzip.compress(bytes(1000))], max_bytes=1000, headers=packed)[0] == [bytes(1000)]
    with refused("too-large"):
        uploads([gzip.compress(bytes(1001))], max_bytes=1000, headers=packed)
    with refused("malformed"):
        uploads([gzip.compress(bytes(10))[:-1]], headers=packed)
    with refused("unsupported-kind"):
        uploads([b"x"], headers={"Content-Encoding": "br"})


def test_parts_are_files_called_so_and_counted() -> None:
    def body(*names: str) -> list[bytes]:
        parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{i}\r\n' for i, name in enumerate(names)]
        return ["".join([*parts, "--b--\r\n"]).encode()]

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert uploads(body("file", "files", "file"), max_clips=3, headers=form)[0] == [b"0", b"1", b"2"]
    cases: list[tuple[list[bytes], dict[str, Any], str]] = [
        (body("file", "file"), {"max_clips": 1}, "too-large"),
        (body("file", "file"), {"max_queue": 1}, "too-large"),
        (body("other"), {}, "wrong-parameter"),
        (body(), {}, "malformed"),
        ([body("file")[0][:-6]], {}, "malformed"),
        ([b"x" * 5000], {}, "malformed"),
    ]
    for pieces, options, kind in cases:
        with refused(kind):
            uploads(pieces, headers=form, **options)
    for wrong in ("multipart/form-data", "multipart/form-data; boundary=" + "b" * 71):
        with refused("malformed"):
            uploads([b"x"], headers={"Content-Type": wrong})
    with refused("unsupported-kind"):
        uploads([b"x"], headers={"Content-Type": "multipart/mixed; boundary=b"})


def test_a_body_that_pauses_is_given_up() -> None:
    with refused("slow-request"):
        uploads([b"a", b"b"], pause=0.3, body_idle_timeout=0.1)


def arrives(monkeypatch: pytest.MonkeyPatch, *pieces: tuple[float, bytes], **options: Any) -> list[bytes]:
    """What is read of pieces that come at these seconds, by a clock of their own."""
    now, left = 0.0, list(pieces)

    async def receive() -> dict[str, Any]:
        nonlocal now
        now, body = left.pop(0)
        return {"type": "http.request", "body": body} | ({"more_body": True} if left else {})

    monkeypatch.setattr("serving.web.uploads.time.monotonic", lambda: now)
    settings, metrics = ServeSettings(models=("x",), **options), Metrics()
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    places = Admission(settings, metrics).places("a")
    return [bytes(file) for file in asyncio.run(Uploads(settings, metrics).files(request, places, 1000.0))]


def test_a_body_that_dawdles_is_given_up_after_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slowest = (0.0, b"a"), (5.0, b"b"), (5.01, bytes(8)), (6.0, bytes(990)), (7.0, b"end")
    assert len(arrives(monkeypatch, *slowest, min_receive_rate=1000)[0]) == 1003
    for second, pieces in enumerate((((0.0, b"a"), (5.01, b"b")), (*slowest[:3], (6.0, bytes(989))))):
        with pytest.raises(ProblemError, match=f"{(2, 999)[second]} bytes came too slowly") as found:
            arrives(monkeypatch, *pieces, (60.0, b"never read"), min_receive_rate=1000)
        assert found.value.type == "slow-request"
    assert arrives(monkeypatch, (0.0, b"a"), (900.0, b"b"), min_receive_rate=0) == [b"ab"]


def test_a_full_service_says_so_before_it_reads_a_body() -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("it was read")

    settings, metrics = ServeSettings(models=("x",), max_queue=1), Metrics()
    admission = Admission(settings, metrics)
    admission.places("a").take_files(1)
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    with refused("busy"):
        asyncio.run(Uploads(settings, metrics).files(request, admission.places("b"), time.monotonic() + 30))


def test_packed_bodies_may_repeat_what_is_32_kilobytes_back_and_are_what_they_say() -> None:
    body = np.random.default_rng(0).bytes(32_000) * 2
    for encoding, pack, other in (("gzip", gzip.compress, zlib.compress), ("x-gzip", gzip.compress, zlib.compress),
                                  ("deflate", zlib.compress, gzip.compress)):  # fmt: skip
        assert len(pack(body)) < 40_000
        assert uploads([pack(body)], headers={"Content-Encoding": encoding})[0] == [body]
        with refused("malformed"):
            uploads([other(body)], headers={"Content-Encoding": encoding})
