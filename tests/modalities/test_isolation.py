"""A decoder's crash, hang or greed costs its file and nothing else."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded_video import encode_video
from PIL import Image

from bridle.modalities import build_modality, isolation
from bridle.modalities.clip import TooLargeError, UndecodableError, WrongKindError
from bridle.processes.child import Child

TARGET = "decoder_faults:answers"


@pytest.fixture(scope="module", autouse=True)
def _no_children_left() -> Iterator[None]:
    yield
    isolation.close_idle()


def ask(fault: str, data: bytes = b"abc", seconds: float = 20.0, **request: Any) -> list[isolation.Answer]:
    request = {"fault": fault, **request}
    return list(isolation.isolated(TARGET, data, request, seconds=seconds, memory_bytes=1 << 30))


def child_pid() -> int:
    return int(ask("echo", answers=1)[0][0]["pid"])


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_answers_come_back_in_order_from_one_lasting_process() -> None:
    data = np.random.default_rng(0).integers(0, 200, 3_000_000, dtype=np.uint8)
    found = ask("echo", data.tobytes(), answers=3)
    assert [header["number"] for header, _ in found] == [0, 1, 2]
    assert all(np.array_equal(array[0], data + count) for count, (_, array) in enumerate(found))
    assert {header["pid"] for header, _ in found} == {child_pid()} != {os.getpid()}


@pytest.mark.parametrize(("fault", "message"), [("segfault", "SIGSEGV"), ("abort", "SIGABRT"), ("bug", "KeyError")])
def test_crash_is_an_error_of_the_file_and_the_next_file_is_decoded(fault: str, message: str) -> None:
    with pytest.raises(UndecodableError, match=message):
        ask(fault)
    assert len(ask("echo", answers=2)) == 2


@pytest.mark.parametrize("fault", ["hang in C without signals", "hang after one"])
def test_hang_is_ended_at_the_time_limit(fault: str) -> None:
    pid = int(ask("echo", seconds=3, answers=1)[0][0]["pid"])
    begin = time.monotonic()
    with pytest.raises(TooLargeError, match="limit of 3 s"):
        ask(fault, seconds=3)  # for ten minutes
    assert time.monotonic() - begin < 100 and not running(pid)


def test_memory_bomb_is_refused_within_the_bound_and_the_process_goes_on() -> None:
    before = child_pid()
    with pytest.raises(TooLargeError, match="memory"):
        ask("memory")
    assert child_pid() == before


def test_clean_refusals_keep_their_class_and_the_process() -> None:
    before = child_pid()
    with pytest.raises(TooLargeError, match="max_pixels = 5"):
        ask("too large")
    assert child_pid() == before


def abandoned(fault: str, **request: Any) -> None:
    answers = isolation.isolated(
        TARGET, bytes(1 << 20), {"fault": fault, **request}, seconds=20.0, memory_bytes=1 << 30
    )
    next(answers)
    answers.close()


def test_a_process_whose_answers_are_not_read_to_the_end_stops_and_answers_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridle.processes.child.CANCEL_SECONDS", 60.0)  # a busy machine takes more than one
    pid = child_pid()
    abandoned("echo", answers=2000)
    assert [header["number"] for header, _ in ask("echo", answers=3)] == [0, 1, 2]
    abandoned("echo", answers=1)  # nothing is left to stop
    assert [header["number"] for header, _ in ask("echo", answers=3)] == [0, 1, 2]
    assert child_pid() == pid


def test_a_process_that_does_not_stop_is_killed() -> None:
    pid = child_pid()
    abandoned("hang after one")
    assert not running(pid) and child_pid() != pid


def test_what_a_library_prints_does_not_spoil_an_answer() -> None:
    assert np.array_equal(ask("prints")[0][1], np.arange(4, dtype=np.float32))


def test_child_writes_no_file_sees_no_secret_and_no_open_file_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    target = tmp_path / "stolen"
    isolation.close_idle()
    with (tmp_path / "private").open("w") as private:
        os.set_inheritable(private.fileno(), True)
        with pytest.raises(UndecodableError):
            ask("writes a file", path=str(target))
        assert not target.exists() or target.stat().st_size == 0
        assert "SECRET_KEY" not in ask("environment")[0][0]["names"]
        assert not [name for name in ask("open files")[0][0]["files"] if "private" in name]


def test_child_reaches_no_network_where_the_kernel_lets_it_leave() -> None:
    child = Child(TARGET, seconds=20.0, memory_bytes=1 << 30)
    with socket.create_server(("127.0.0.1", 0)) as server:
        ((header, _),) = child.answers(b"", {"fault": "network", "port": server.getsockname()[1]})
    child.close()
    assert (header["code"] == 0) == child.has_network


def test_threads_have_a_process_each() -> None:
    found: dict[int, int] = {}

    def work(number: int) -> None:
        found[number] = int(ask("echo", bytes(1000), answers=20)[0][1][0, 0])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 0, 1: 0}


def test_forked_workers_start_their_own_process_and_leave_ours_alone() -> None:
    ours = child_pid()
    queue = multiprocessing.get_context("fork").SimpleQueue()
    worker = multiprocessing.get_context("fork").Process(target=lambda: queue.put(child_pid()), daemon=True)
    worker.start()
    theirs = queue.get()
    worker.join()
    assert theirs != ours and child_pid() == ours
    wait_until_gone(theirs)


def test_no_process_outlives_a_killed_parent() -> None:
    code = (
        "import sys, time; sys.path[:0] = eval(sys.argv[1])\n"
        "from bridle.processes.child import Child\n"
        "child = Child('decoder_faults:answers', seconds=9.0, memory_bytes=1 << 30)\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, repr(sys.path)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 120
    while running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_modality_decodes_in_a_child_for_services() -> None:
    modality = build_modality("image", {"size": [32, 64]})
    picture = build_modality("video", {"frames": 8, "stride": 2, "size": [64, 96]})
    for made, data in ((picture, encode_video(20)), (modality, _png())):
        apart = list(isolation.isolated_windows(made, data, seconds=60.0, memory_bytes=4 << 30))
        for ours, theirs in zip(made.windows(data), apart, strict=True):
            assert torch.equal(ours.values, theirs.values)
            assert (ours.grid, ours.valid, ours.start_s) == (theirs.grid, theirs.valid, theirs.start_s)
    with pytest.raises(WrongKindError, match="expected a JPEG"):
        list(isolation.isolated_windows(modality, b"fLaC" + bytes(99), seconds=60.0, memory_bytes=4 << 30))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
