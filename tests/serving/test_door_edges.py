"""The door's limits, to the byte and the second: bodies, parts, NPZ files, keys."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import io
import struct
import time
import zipfile
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request

from bridle.settings import RecipeError
from serving.metrics import Metrics
from serving.settings import ServeSettings, read_settings
from serving.web import keys
from serving.web.admission import Admission
from serving.web.answers import negotiate
from serving.web.app import build_app
from serving.web.keys import Key, KeyRing, new_key, parse_keys, presented_key
from serving.web.npz import MAX_DIRECTORY, read_npz, write_npz
from serving.web.problems import ClientGoneError, ProblemError
from serving.web.service import Service
from serving.web.uploads import OVERHEAD, UNFOLDED_AT_ONCE, Uploads


def told(kind: str, text: str) -> Any:
    """A problem of this kind that says so, literally."""
    return pytest.raises(ProblemError, check=lambda error: error.type == kind and text in error.detail)


class Sent:
    """A body that comes in pieces; what was read of it, and what was counted."""

    def __init__(self, *pieces: bytes | None, **headers: str) -> None:
        """pieces: None is the end of the connection."""
        self._left = list(pieces)
        self.turns = 0
        self._headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.metrics = Metrics()

    async def _receive(self) -> dict[str, Any]:
        piece = self._left.pop(0)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(self._left)}

    def files(self, seconds: float = 30.0, **options: Any) -> list[bytes]:
        settings = ServeSettings(models=("x",), **options)
        request = Request({"type": "http", "method": "POST", "path": "/", "headers": self._headers}, self._receive)
        self.places = Admission(settings, self.metrics).places("a")

        async def read() -> list[bytearray]:
            async def count() -> None:
                while True:
                    self.turns += 1
                    await asyncio.sleep(0)

            others = asyncio.create_task(count())
            try:
                return await Uploads(settings, self.metrics).files(request, self.places, time.monotonic() + seconds)
            finally:
                others.cancel()

        return [bytes(file) for file in asyncio.run(read())]


FORM = "multipart/form-data; boundary=b"


def part(*headers: str, content: bytes = b"x") -> bytes:
    return b"--b\r\n" + "".join(f"{line}\r\n" for line in headers).encode() + b"\r\n" + content + b"\r\n"


NAMED = 'Content-Disposition: form-data; name="file"'
END = b"--b--\r\n"


# Bodies.


def test_bytes_are_counted_once_and_empty_pieces_are_no_end() -> None:
    sent = Sent(b"ab", b"", b"c", content_length="3")
    assert sent.files(max_bytes=3) == [b"abc"]
    assert (sent.places.files, sent.places.bytes) == (1, 3)
    assert sent.metrics.registry.get_sample_value("bridle_serve_received_bytes_total") == 3
    assert Sent(b"ab", content_length="nonsense").files() == [b"ab"]
    with told("too-large", "larger than 3 bytes"):
        Sent(b"", content_length="4").files(max_bytes=3)


def test_who_hangs_up_is_gone_and_who_is_late_is_told() -> None:
    with pytest.raises(ClientGoneError):
        Sent(b"ab", None).files()

    class Silent(Sent):
        async def _receive(self) -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

    began = time.monotonic()
    with told("slow-request", "no byte of the body for 0.0 s"):  # the deadline has passed
        Silent().files(seconds=-0.5)
    with told("slow-request", "no byte of the body for 0.1 s"):
        Silent().files(seconds=0.1, body_idle_timeout=50)
    with told("slow-request", "no byte of the body for 0.2 s"):
        Silent().files(seconds=50, body_idle_timeout=0.2)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("name, box", [("gzip", 31), ("x-gzip", 31), ("deflate", 15), ("GZIP ", 31)])
def test_each_packing_that_is_named_is_unpacked(name: str, box: int) -> None:
    packer = zlib.compressobj(wbits=box)
    packed = packer.compress(b"hello " * 100) + packer.flush()
    sent = Sent(packed[:20], packed[20:], content_encoding=name)
    assert sent.files() == [b"hello " * 100]
    assert sent.places.bytes == 600 + len(packed)
    assert Sent(b"ab", content_encoding="").files() == Sent(b"ab", content_encoding="identity").files() == [b"ab"]


def test_a_packed_body_is_checked_to_its_end() -> None:
    packed = gzip.compress(b"hello")
    with told("malformed", "something follows the end of the gzip body"):
        Sent(packed + b"more", content_encoding="gzip").files()
    with told("malformed", "the gzip body ends too early"):
        Sent(packed[:-1], content_encoding="gzip").files()
    with told("malformed", "the body is no gzip: "):
        Sent(b"plain text that is not packed", content_encoding="gzip").files()
    with told("unsupported-kind", f"Content-Encoding {'z' * 40!r} is not taken: send gzip, x-gzip, deflate or none"):
        Sent(b"", content_encoding="z" * 50).files()


def test_others_have_their_turn_while_a_bomb_unfolds() -> None:
    pieces = 16
    sent = Sent(gzip.compress(bytes(pieces * UNFOLDED_AT_ONCE)), content_encoding="gzip")
    assert len(sent.files()[0]) == 4 << 20  # 256 kB at once
    assert pieces <= sent.turns <= pieces + 8


# Parts.


def test_a_part_is_known_by_its_disposition_however_it_is_written() -> None:
    ways = [
        NAMED,
        'content-disposition: form-data; name="files"; filename="a.wav"',
        'Content-Disposition: form-data; filename="na;me.wav"; name="file"',
        "Content-Disposition: form-data; name=file",
    ]
    for way in ways:
        for headers in ([way], ["Content-Type: audio/wav", way], [way, 'X-Other: form-data; name="other"']):
            assert Sent(part(*headers) + END, content_type=FORM).files() == [b"x"], headers
            assert Sent(part(*headers, 'A: form-data; name="other"') + END, content_type=FORM).files() == [b"x"]


def test_a_part_of_another_name_or_none_is_told_with_its_place() -> None:
    with told("wrong-parameter", "part 1 is called 'model', expected file"):
        Sent(part(NAMED) + part(NAMED.replace("file", "model")) + END, content_type=FORM).files()
    with told("wrong-parameter", "part 1 is called '', expected file"):  # the name of the one before is not its own
        Sent(part(NAMED) + part("Content-Type: audio/wav") + END, content_type=FORM).files()
    with told("wrong-parameter", f"part 0 is called '{'n' * 40}', expected"):
        Sent(part(NAMED.replace("file", "n" * 60)) + END, content_type=FORM).files()
    with pytest.raises(ProblemError, match="part is empty") as found:
        Sent(part(NAMED) + part(NAMED, content=b"") + END, content_type=FORM).files()
    assert (found.value.type, found.value.extra) == ("undecodable", {"clip": 1})


def test_parts_are_counted_with_as_many_headers_as_a_part_may_have() -> None:
    assert len(Sent(part(NAMED) * 3 + END, content_type=FORM).files(max_clips=3)) == 3
    with told("too-large", "more than max_clips = 3 files"):
        Sent(part(NAMED) * 4 + END, content_type=FORM).files(max_clips=3)
    assert Sent(part(*["A: b"] * 7, NAMED) + END, content_type=FORM).files() == [b"x"]
    with told("malformed", "the multipart body is malformed"):
        Sent(part(*["A: b"] * 8, NAMED) + END, content_type=FORM).files()
    assert Sent(part("A: " + "b" * 2045, NAMED) + END, content_type=FORM).files() == [b"x"]
    with told("malformed", "the multipart body is malformed"):
        Sent(part("A: " + "b" * 2046, NAMED) + END, content_type=FORM).files()


def test_the_syntax_of_parts_is_bounded() -> None:
    for length in (1, 70):
        body = (part(NAMED) + END).replace(b"--b", b"--" + b"b" * length)
        assert Sent(body, content_type=f"multipart/form-data; boundary={'b' * length}").files() == [b"x"]
    for length in (0, 71):
        with told("malformed", f"the multipart boundary has {length} bytes, expected 1 to 70"):
            Sent(b"", content_type=f"multipart/form-data; boundary={'b' * length}").files()
    whole = part(NAMED, content=b"y" * (100 + 3 * OVERHEAD - len(part(NAMED) + END) + 1)) + END
    assert len(whole) == 100 + 3 * OVERHEAD
    assert len(Sent(whole, content_type=FORM).files(max_bytes=100, max_clips=3)) == 1
    with told("too-large", f"larger than {100 + 3 * OVERHEAD} bytes"):
        Sent(whole, b"z", content_type=FORM).files(max_bytes=100, max_clips=3)


def test_a_part_begins_soon() -> None:
    with told("malformed", "the multipart body ends before its last boundary"):
        Sent(b"\r\n" * 2048, b"-", content_type=FORM).files()
    with told("malformed", "no multipart part begins within 4096 bytes"):
        Sent(b"\r\n" * 2049, content_type=FORM).files()


# NPZ.


def archive(*members: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as out:
        for name, content in members:
            out.writestr(name, content)
    return file.getvalue()


def array(value: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, value, version=version)
    return file.getvalue()


GOOD = array(np.arange(6, dtype=np.int64).reshape(2, 3))


def read(data: bytes, **bounds: int) -> dict[str, Any]:
    return read_npz(data, **{"max_arrays": 4, "max_numbers": 1000, **bounds})


def test_arrays_of_both_versions_and_kinds_of_member_are_read() -> None:
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for version in ((1, 0), (2, 0)):
            for name in ("codes.npy", "codes"):
                content = array(np.arange(6, dtype=np.uint8).reshape(2, 3), version)
                found = read(archive((name, content), kind=kind))
                assert found["codes"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert write_npz({"a": np.zeros(1000, np.int64)}).count(bytes(8000)) == 1  # not compressed


def test_an_encrypted_or_strange_member_is_refused_and_other_flags_are_not() -> None:
    data = bytearray(archive(("codes.npy", GOOD)))
    at = data.rfind(b"PK\x01\x02") + 8
    for flag in (0x2, 0x800):
        data[at : at + 2] = struct.pack("<H", flag)
        assert read(bytes(data))["codes"].shape == (2, 3)
    data[at] = 1
    with told("malformed", "a member is encrypted or compressed in a strange way"):
        read(bytes(data))


def with_directory(size: int) -> bytes:
    """An archive whose directory has so many bytes."""
    name = "c" * 10
    plain = archive((name, GOOD))
    grown = size - (len(plain) - 22 - plain.find(b"PK\x01\x02"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        info = zipfile.ZipInfo(name)
        info.comment = b"c" * grown
        out.writestr(info, GOOD)
    return file.getvalue()


def test_the_directory_has_at_most_its_bytes_and_stands_at_the_end() -> None:
    assert read(with_directory(MAX_DIRECTORY - 1))
    assert read(with_directory(MAX_DIRECTORY))
    assert MAX_DIRECTORY == 65536
    far = bytearray(with_directory(MAX_DIRECTORY))
    at = far.rfind(b"PK\x05\x06")
    far[at + 12 : at + 16] = struct.pack("<I", MAX_DIRECTORY + 1)
    with told("too-large", "the NPZ's directory is longer than 65536 bytes"):
        read(bytes(far))
    for cut in (1, 21):
        with told("malformed", "there is no zip directory at its end"):
            read(archive(("codes.npy", GOOD))[:-cut])
    assert read(archive()) == {}


def test_a_directory_of_the_large_kind_is_refused() -> None:
    plain = archive(("codes.npy", GOOD))
    locator = b"PK\x06\x07" + bytes(16)
    with told("too-large", "the NPZ's directory is longer"):
        read(plain[:-22] + locator + plain[-22:])
    assert read(plain[:-22].replace(b"codes.npy", b"code\x00.npy", 0) + plain[-22:])
    with told("too-large", "the NPZ's directory is longer"):
        read(locator + plain[-22:])


def test_numbers_and_arrays_are_counted_before_they_are_unfolded() -> None:
    content = array(np.zeros(1000, np.int64))
    room = (len(content) - 1024) // 8  # a kilobyte an array is for its header
    assert read(archive(("a", content)), max_arrays=1, max_numbers=room)
    with told("too-large", f"the NPZ unfolds to more than {room - 1} numbers"):
        read(archive(("a", content)), max_arrays=1, max_numbers=room - 1)
    assert len(read(archive(("a", GOOD), ("b", GOOD)), max_arrays=2)) == 2
    with told("too-large", "the NPZ holds 2 arrays, at most 1 are taken"):
        read(archive(("a", GOOD), ("b", GOOD)), max_arrays=1)
    with told("too-large", "unfolds to more than 100 numbers"):  # all of them together
        read(archive(("a", GOOD), ("b", content), ("c", content)), max_arrays=3, max_numbers=100)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npz({"a": np.array([{}], object)})


def test_a_member_is_exactly_its_array() -> None:
    for content in (GOOD[:-1], GOOD + b"x"):
        with told("malformed", "an array of shape [2, 3] has"):
            read(archive(("codes.npy", content)))
    with told("malformed", "a side below 0"):
        read(archive(("codes.npy", GOOD.replace(b"(2, 3)", b"(-1,3)"))))
    assert read(archive(("codes.npy", array(np.zeros((0, 3), np.int64)))))["codes"].shape == (0, 3)
    for dtype in (np.float32, np.bool_, np.complex64):
        with told("wrong-parameter", f"an array holds {np.dtype(dtype)}, expected integers"):
            read(archive(("codes.npy", array(np.zeros((1, 2), dtype)))))
    assert read(archive(("codes.npy", array(np.asfortranarray(np.arange(6).reshape(2, 3))))))["codes"].tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]


# Keys.


def test_keys_beside_each_other_comments_and_what_cannot_be_changed() -> None:
    (one, first), (two, second) = new_key("one"), new_key("two", ("use", "metrics", "admin"))
    found = parse_keys(f" {first} , {second}\n\n  # {first}\n", "here")
    assert [key.name for key in found] == ["one", "two"]
    assert found[1].scopes == {"use", "metrics", "admin"}
    ring = KeyRing(ServeSettings(models=("x",), api_keys=f"{first},{second}"))
    assert [ring.find(key).name for key in (one, two)] == ["one", "two"]  # type: ignore[union-attr]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].name = "root"  # type: ignore[misc]
    assert Key("one", frozenset({"use"}), keys.digest(one)) == found[0]
    assert not KeyRing(ServeSettings(models=("x",))).needed


@pytest.mark.parametrize("name", ["", "n" * 65, "a b", "ä"])
def test_names_of_keys_are_short_and_plain(name: str) -> None:
    with pytest.raises(RecipeError, match="expected a name of up to 64 letters"):
        new_key(name)
    assert new_key("n" * 64)[1].startswith("n" * 64)
    with pytest.raises(RecipeError, match="'root', expected some of use, metrics, admin"):
        new_key("a", ("use", "root"))


def test_three_keys_of_which_two_have_one_name_are_told() -> None:
    lines = [f"{name}:use:{digit * 64}" for name, digit in (("a", "1"), ("b", "2"), ("a", "3"))]
    with pytest.raises(RecipeError, match="two keys have one name; rename one of a, b"):
        parse_keys("\n".join(lines), "here")
    assert len(parse_keys("\n".join(lines[:2]), "here")) == 2


def test_headers_are_read_without_regard_to_case_and_the_first_wins() -> None:
    assert presented_key({"authorization": "BEARER abc", "x-api-key": "other"}) == "abc"
    assert presented_key({"authorization": "Bearer ", "x-api-key": "other"}) is None
    assert presented_key({"authorization": "Digest abc", "x-api-key": "other"}) == "other"


def test_a_page_that_may_call_reads_why_it_may_not() -> None:
    page, other = "https://app.example", "https://other.example"
    settings = ServeSettings(models=("x",), api_keys=new_key("a")[1], cors_origins=(page,))

    async def asked(origin: str) -> tuple[int, str | None]:
        transport = httpx.ASGITransport(build_app(Service(settings)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/info", headers={"Origin": origin})
        return answer.status_code, answer.headers.get("access-control-allow-origin")

    assert asyncio.run(asked(page)) == (401, page)
    assert asyncio.run(asked(other)) == (403, None)


@pytest.mark.parametrize("origin", ["*", "https://app.example/", "app.example", "https://*.example"])
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(RecipeError, match="is no origin"):
        read_settings({"models": "x", "cors_origins": f"http://localhost:3000,{origin}"}, {})


def test_a_key_that_cannot_be_made_is_told_by_its_own_words() -> None:
    with pytest.raises(RecipeError, match="--new-key 'a b': expected a name"):
        new_key("a b")
    with pytest.raises(RecipeError, match="--scopes: found 'use,admin', expected some of use, metrics, admin"):
        new_key("a", ("use,admin",))


def test_an_answer_is_never_of_a_kind_that_the_client_refuses() -> None:
    offered = ("application/json", "application/x-npz")
    assert negotiate("application/json;q=0, */*", offered) == "application/x-npz"
    assert negotiate("*/*, application/json; q=0.0", offered) == "application/x-npz"
    assert negotiate("application/x-npz, */*", offered) == "application/x-npz"
    assert negotiate("application/json;q=0.5, application/*;q=0.4", offered) == "application/json"
    with told("not-acceptable", "Accept names none"):
        negotiate("*/*;q=0", offered)
