"""Remote shards arrive whole, are checked, and never meet under one name."""

from __future__ import annotations

import contextlib
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from shard_inputs import MakeTar, write_tar

from bridle.data import fetch
from bridle.data.cache import ShardCache
from bridle.data.errors import ShardError
from bridle.data.patterns import expand
from bridle.data.shards import ShardSet, open_shards
from bridle.data.stream import Stream
from bridle.data.writer import write_index
from bridle.remote import access


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder by path; `answers` holds what to do with the next requests of a path."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.answers: dict[str, list[int | str]] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        file = self.server.root / path.lstrip("/")
        queued = self.server.answers.get(path, [])
        answer = queued.pop(0) if queued else (200 if file.is_file() else 404)
        content = file.read_bytes() if file.is_file() else b"no"
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content[: len(content) // 2] if answer == "drop" else content)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "www")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "FIRST_WAIT_SECONDS", 0.001)


def samples(text: str, count: int = 6) -> list[tuple[str, bytes]]:
    return [(f"{text}{i}.num", str(i).encode() * 3000) for i in range(count)]


def contents(shards: ShardSet) -> list[bytes]:
    return [shards.read(i).data for i in range(len(shards))]


def test_http_shards_without_an_index_are_fetched_and_indexed_once(server: Server, make_tar: MakeTar) -> None:
    make_tar(server.root / "a-0.tar", samples("a"))
    make_tar(server.root / "a-1.tar", samples("b"))
    pattern = f"{server.address}/a-{{0,1}}.tar"
    assert contents(open_shards([pattern], extensions=["num"])) == [content for _, content in samples("a") * 2]
    server.requests.clear()
    assert len(contents(open_shards([pattern], extensions=["num"]))) == 12
    asked = [path for path in server.requests if path.endswith(".tar")]
    assert sorted(asked) == ["/a-0.tar", "/a-1.tar"]  # for their size only; the content comes from the cache


def test_a_published_index_saves_the_fetch(server: Server, make_tar: MakeTar) -> None:
    write_index(make_tar(server.root / "s.tar", samples("a")))
    shards = open_shards([f"{server.address}/s.tar"], extensions=["num"])
    assert len(shards) == 6 and "/s.tar" not in server.requests
    assert shards.read(2).data == b"2" * 3000


def test_a_dropped_connection_loses_nothing(server: Server, make_tar: MakeTar) -> None:
    write_index(make_tar(server.root / "s.tar", samples("a")))
    server.answers["/s.tar"] = ["drop", 503, 429, "drop"]
    assert len(contents(open_shards([f"{server.address}/s.tar"], extensions=["num"]))) == 6


def test_a_connection_that_always_drops_is_an_error(server: Server, make_tar: MakeTar, own_cache: Path) -> None:
    write_index(make_tar(server.root / "s.tar", samples("a")))
    server.answers["/s.tar"] = ["drop"] * 99
    shards = open_shards([f"{server.address}/s.tar"], extensions=["num"])
    with pytest.raises(ShardError, match=r"s\.tar: 5 tries failed, the last: .*; check the network and run again"):
        shards.read(0)
    assert not list((own_cache / "shards").glob("*.tar"))


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (403, "403 .* check that this machine may read it"),
        (404, "404 .* check the address"),
        (418, "418 .* check the address"),
    ],
)
def test_refusals_are_told_at_once(server: Server, status: int, match: str) -> None:
    server.answers["/s.tar"] = [status]
    server.answers["/s.tar.index"] = [404]
    with pytest.raises(ShardError, match=match):
        open_shards([f"{server.address}/s.tar"], extensions=["num"])
    assert server.requests.count("/s.tar") == 1


@pytest.mark.parametrize("answer", [400, 405, "html"])
def test_a_server_that_gives_anything_for_an_index_is_taken_to_have_none(
    server: Server, make_tar: MakeTar, answer: int | str
) -> None:
    make_tar(server.root / "s.tar", samples("a"))
    if answer == "html":
        (server.root / "s.tar.index").write_bytes(b"<!doctype html><title>Welcome</title>\n<p>Nothing here.\n")
    else:
        server.answers["/s.tar.index"] = [answer] * 9
    assert contents(open_shards([f"{server.address}/s.tar"], extensions=["num"]))[4] == b"4" * 3000


def test_a_shard_rebuilt_at_the_same_size_is_never_read_at_the_old_offsets(server: Server, make_tar: MakeTar) -> None:
    pattern = f"{server.address}/s.tar"
    tar = make_tar(server.root / "s.tar", [("a.num", b"1" * 400), ("b.num", b"2" * 600), ("c.num", b"3")])
    write_index(tar)
    assert contents(open_shards([pattern], extensions=["num"]))[1] == b"2" * 600
    make_tar(tar, [("a.num", b"1" * 600), ("b.num", b"2" * 400), ("c.num", b"3")])
    header = write_index(tar)
    assert contents(open_shards([pattern], extensions=["num"]))[1] == b"2" * 400  # not the copy in the cache

    make_tar(tar, [("a.num", b"1" * 400), ("b.num", b"2" * 600), ("c.num", b"3")])
    beside = server.root / "s.tar.index"
    beside.write_text(beside.read_text().replace(f'"{header.sha256}"', "null"))  # an index that nobody hashed for
    with pytest.raises(ShardError, match=r"s\.tar: its index was made for another tar of the same size; upload"):
        open_shards([pattern], extensions=["num"]).read(1)


def test_a_shard_that_is_not_its_index_is_refused(server: Server, make_tar: MakeTar) -> None:
    tar = make_tar(server.root / "s.tar", samples("a"))
    write_index(tar)
    whole = tar.read_bytes()
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(ShardError, match=r"s\.tar: \d+ bytes, but its index says \d+; upload"):
        open_shards([f"{server.address}/s.tar"], extensions=["num"]).read(0)
    tar.write_bytes(whole.replace(b"222", b"223", 1))
    with pytest.raises(ShardError, match=r"s\.tar: sha256 .* but its index says .*; upload"):
        open_shards([f"{server.address}/s.tar"], extensions=["num"]).read(0)
    tar.write_bytes(whole)
    assert open_shards([f"{server.address}/s.tar"], extensions=["num"]).read(0).data == b"0" * 3000


def test_a_truncated_remote_tar_is_named_by_its_url(server: Server, make_tar: MakeTar) -> None:
    tar = make_tar(server.root / "s.tar", samples("a"))
    tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(ShardError, match=r"^http://127.*/s\.tar: (truncated|not a whole tar)"):
        open_shards([f"{server.address}/s.tar?signature=secret"], extensions=["num"])


@pytest.mark.parametrize("answer", [404, 403, 503, "drop"])
def test_secrets_of_a_url_stay_out_of_messages(
    server: Server, answer: int | str, make_tar: MakeTar, caplog: pytest.LogCaptureFixture
) -> None:
    make_tar(server.root / "s.tar", samples("a"))
    server.answers["/s.tar"] = [answer] * 99
    address = server.address.replace("http://", "http://user:password@")
    with pytest.raises(ShardError, match=r"404|403|503|tries failed") as error:
        open_shards([f"{address}/s.tar?signature=secret%2B"], extensions=["num"])
    for said in (str(error.value), caplog.text):
        assert "secret" not in said and "password" not in said


def test_shards_of_one_name_do_not_meet(server: Server, tmp_path: Path, make_tar: MakeTar) -> None:
    make_tar(server.root / "one" / "s-0000.tar", samples("a", 2))
    make_tar(server.root / "two" / "s-0000.tar", samples("b", 3))
    local = make_tar(tmp_path / "s-0000.tar", samples("c", 4))
    patterns = [f"{server.address}/{{one,two}}/s-0000.tar", str(local)]
    shards = open_shards(patterns, extensions=["num"])
    assert [shards.read(i).key for i in range(9)] == ["a0", "a1", "b0", "b1", "b2", "c0", "c1", "c2", "c3"]


def test_the_cache_keeps_its_bound_and_loses_no_sample(server: Server, make_tar: MakeTar, tmp_path: Path) -> None:
    for i in range(6):
        write_index(make_tar(server.root / f"{i}.tar", samples(f"s{i}-")))
    size = (server.root / "0.tar").stat().st_size
    bound = 2.5 * size / 1e9
    pattern = f"{server.address}/{{0..5}}.tar"
    shards = open_shards([pattern], extensions=["num"], cache=str(tmp_path / "small"), cache_gb=bound)
    assert len(contents(shards)) == 36
    kept = list((tmp_path / "small" / "shards").glob("*.tar"))
    assert len(kept) == 2
    with pytest.raises(ShardError, match=r"bytes do not fit the cache of .* GB; raise data\.cache_gb"):
        open_shards([pattern], extensions=["num"], cache=str(tmp_path / "tiny"), cache_gb=size / 2e9).read(0)


def test_coming_shards_are_fetched_ahead(server: Server, make_tar: MakeTar, own_cache: Path) -> None:
    for i in range(4):
        write_index(make_tar(server.root / f"{i}.tar", samples(f"s{i}-")))
    shards = open_shards([f"{server.address}/{{0..3}}.tar"], extensions=["num"])
    stream = Stream(shards, lambda data, rng: {"n": torch.tensor(len(data))}, seed=0, block=6, window=1, shuffle=False)
    batches = stream.micro_batches(start=0, stop=24, batch_size=1, micro_batch_size=1, rank=0, world=1, workers=0)
    next(batches)
    ahead = Path(shards.cache.fetch(shards.shards[1].url, shards.shards[1].header) or "")
    assert ahead.exists() and "/1.tar" in server.requests and "/3.tar" not in server.requests
    assert len(list(batches)) == 23
    assert {path: server.requests.count(path) for path in ("/0.tar", "/1.tar", "/3.tar")} == {
        "/0.tar": 1,
        "/1.tar": 1,
        "/3.tar": 1,
    }


def test_pipe_reads_a_command(tmp_path: Path, make_tar: MakeTar) -> None:
    make_tar(tmp_path / "0.tar", samples("a"))
    make_tar(tmp_path / "1.tar", samples("b"))
    shards = open_shards([f"pipe:cat '{tmp_path}'/{{0,1}}.tar"], extensions=["num"])
    assert len(contents(shards)) == 12


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("cat /no/such/file", r"exit code 1: cat: /no/such/file: No such file"),
        ("head -c 9000 FILE; exit 3", r"exit code 3: it said nothing"),
        ("head -c 9000 FILE", r"(truncated|not a whole tar)"),
        ("true", r"not a whole tar"),
        ("kill -9 $$", r"exit code -9"),
    ],
)
def test_a_pipe_that_fails_is_an_error(tmp_path: Path, make_tar: MakeTar, command: str, match: str) -> None:
    tar = make_tar(tmp_path / "0.tar", samples("a"))
    with pytest.raises(ShardError, match=rf"^pipe:.*{match}"):
        open_shards(["pipe:" + command.replace("FILE", str(tar))], extensions=["num"])


def test_a_pipe_that_stalls_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PIPE_STALL_SECONDS", 0.2)
    with pytest.raises(ShardError, match=r"written nothing for 0\.2 s"):
        open_shards(["pipe:sleep 60"], extensions=["num"])


def test_any_store_that_fsspec_knows_is_searched_and_read(tmp_path: Path, make_tar: MakeTar) -> None:
    store = MemoryFileSystem()
    for name in ("train-0", "train-1", "deep/train-2", "other-0"):
        store.pipe_file(f"/bucket/{name}.tar", make_tar(tmp_path / "s.tar", samples(name)).read_bytes())
    found = open_shards(["memory://bucket/train-*.tar"], extensions=["num"])
    assert [shard.url for shard in found.shards] == ["memory://bucket/train-0.tar", "memory://bucket/train-1.tar"]
    assert contents(found) == [content for _, content in samples("a") * 2]
    assert [shard.url for shard in open_shards(["memory://bucket/train-?.tar"], extensions=["num"]).shards] == [
        "memory://bucket/train-0.tar", "memory://bucket/train-1.tar",
    ]  # fmt: skip
    everywhere = open_shards(["memory://bucket/*train-*.tar"], extensions=["num"])
    assert [shard.url.rpartition("/")[2] for shard in everywhere.shards] == [
        "train-2.tar",
        "train-0.tar",
        "train-1.tar",
    ]
    with pytest.raises(ShardError, match=r"^memory://bucket/none\.tar: not found .*; check the address"):
        open_shards(["memory://bucket/none.tar"], extensions=["num"])
    store.store.clear()


@pytest.mark.parametrize(("scheme", "library", "extra"), [("gs", "gcsfs", "gs"), ("az", "adlfs", "az")])
def test_a_store_whose_library_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, scheme: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(ShardError, match=rf"^{scheme}://.*needs a library.*{library}.*pip install 'bridle\[{extra}\]'"):
        open_shards([f"{scheme}://bucket/s.tar"], extensions=["num"])


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        ([], "the list of shards is empty"),
        ([""], "a pattern of shards is empty"),
        (["no/such-*.tar"], r"'no/such-\*\.tar': matches nothing"),
        (["no/{0..3}.tar"], "no such file 'no/0.tar'"),
        (["x{0..3.tar"], "the braces do not match"),
        (["."], r"'\.' is a folder; write '\./\*\.tar'"),
        (["s4://b/k.tar"], r"unknown kind 's4://'; did you mean 's3://'"),
        (["http://h/*.tar"], "a web server cannot be searched"),
        (["builtin:odio"], "no such sample; did you mean 'audio'"),
    ],
)
def test_patterns_that_name_nothing_are_refused(patterns: list[str], match: str) -> None:
    with pytest.raises(ShardError, match=match):
        expand(patterns)


def test_no_sample_with_a_wanted_extension_is_refused(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("a.json", b"{}")])
    with pytest.raises(ShardError, match=r"no sample with a member of wav, flac in 1 shards .*; found only: jpg, json"):
        open_shards([str(tar)], extensions=["wav", "flac"])
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ShardError, match="they hold no samples at all"):
        open_shards([str(empty)], extensions=["wav"])


def test_two_processes_fetch_a_shard_once(server: Server, make_tar: MakeTar) -> None:
    write_index(make_tar(server.root / "s.tar", samples("a", 40)))
    shards = open_shards([f"{server.address}/s.tar"], extensions=["num"])
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            os._exit(0 if len(contents(shards)) == 40 else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert server.requests.count("/s.tar") == 1


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"cache folder .*file/.*; name a folder you may write \(data\.cache"):
        ShardCache(tmp_path / "file").index_place("http://h/s.tar")


def test_blocks_smaller_than_a_shard_over_a_cache_too_small_for_all_are_warned_of(
    server: Server, make_tar: MakeTar, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each shard would be fetched once for each of its blocks."""
    for i in range(3):
        write_index(make_tar(server.root / f"{i}.tar", samples(f"s{i}-", 6 - i)))
    sizes = [(server.root / f"{i}.tar").stat().st_size for i in range(3)]
    pattern = f"{server.address}/{{0..2}}.tar"

    def warned(cache_gb: float, block: int) -> bool:
        caplog.clear()
        cache = str(tmp_path / f"cache-{cache_gb}")
        shards = open_shards([pattern], extensions=["num"], cache=cache, cache_gb=cache_gb)
        Stream(shards, lambda data, rng: {}, seed=0, block=block, window=1)
        return "do not fit the cache" in caplog.text

    assert warned(sizes[0] / 1e9, 5)
    assert "data.shuffle_block=6 (a whole shard)" in caplog.text
    assert not warned(sizes[0] / 1e9, 6), "a block is a shard"
    assert not warned(sum(sizes) * 1.01 / 1e9, 1), "all fit"
