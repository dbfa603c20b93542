"""The parts that keep the service fair, each by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web import admission as admission_module
from serving.web.admission import Admission
from serving.web.problems import ProblemError


def admission(metrics: Metrics | None = None, **settings: Any) -> Admission:
    return Admission(ServeSettings(models=("x",), **settings), metrics or Metrics())


def test_a_request_of_many_files_needs_as_many_places() -> None:
    part = admission(max_queue=8)
    first, second = part.places("a"), part.places("a")
    first.take_files(6)
    with pytest.raises(ProblemError, match="max_queue is 8"):
        second.take_files(3)
    second.take_files(2)
    first.close()
    second.take_files(6)


def test_bytes_are_bounded_and_files_and_bytes_come_back_apart() -> None:
    part = admission(max_queue=2, max_queue_bytes=100)
    places = part.places("a")
    places.take_files(2)
    places.take_bytes(100)
    with pytest.raises(ProblemError, match="max_queue_bytes is 100"):
        part.places("a").take_bytes(1)
    places.give_back_files()
    part.places("a").take_files(2)
    with pytest.raises(ProblemError, match="max_queue_bytes is 100"):
        part.places("a").take_bytes(1)
    places.close()
    part.places("a").take_bytes(100)


def test_the_longest_timeout_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    go, part = at(monkeypatch), admission(request_timeout=5.0)
    go(1000.0)
    assert part.deadline(None) == 1005.0
    assert part.deadline("2") == 1002.0
    assert part.deadline("1000") == 1005.0
    for wrong in ("0.05", "-1", "nan", "inf", "soon", ""):
        with pytest.raises(ProblemError, match="X-Request-Timeout"):
            part.deadline(wrong)


def test_a_client_gets_its_share_only_while_others_wait() -> None:
    part = admission(max_queue=8, max_share=0.5)
    alone = part.places("greedy")
    alone.take_files(7)
    part.places("other").take_files(1)  # there was one left
    alone.close()
    greedy = part.places("greedy")
    greedy.take_files(4)
    with pytest.raises(ProblemError, match="a share is 4"):
        part.places("greedy").take_files(1)
    part.places("other").take_files(1)
    part.places("third").take_files(1)
    whole = admission(max_queue=8, max_share=0.5)
    whole.places("other")
    whole.places("first").take_files(8)  # one request may be larger than a share: it holds nothing else


def test_retry_after_follows_the_rate_of_the_last_answers() -> None:
    part = admission(max_queue=64)
    assert part.retry_after == 1.0
    for _ in range(8):
        places = part.places("a")
        places.take_files(8)
        places.close()
    assert part.retry_after == 1.0


def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that admission goes by."""

    def go(now: float) -> None:
        monkeypatch.setattr(admission_module.time, "monotonic", lambda: now)

    return go


def test_who_was_here_within_ten_seconds_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    go, part = at(monkeypatch), admission(max_queue=8, max_share=0.5)
    go(1000.0)
    part.places("other")
    part.places("greedy").take_files(4)
    go(1009.9)
    with pytest.raises(ProblemError, match="4 files of yours are under way, and others wait; a share is 4"):
        part.places("greedy").take_files(1)
    go(1010.0)
    part.places("greedy").take_files(1)
    go(1011.0)
    part.places("other")
    with pytest.raises(ProblemError, match="5 files of yours"):
        part.places("greedy").take_files(1)


def test_a_share_is_filled_to_its_last_place_and_no_further() -> None:
    part = admission(max_queue=9, max_share=0.5, max_queue_bytes=101)
    part.places("other")
    greedy = part.places("greedy")
    greedy.take_files(1)
    greedy.take_files(3)
    greedy.take_bytes(1)
    greedy.take_bytes(49)
    with pytest.raises(ProblemError, match="50 bytes of yours are under way, and others wait; a share is 50"):
        greedy.take_bytes(1)
    with pytest.raises(ProblemError, match="a share is 4"):
        greedy.take_files(1)
    part.places("other").take_files(5)
    with pytest.raises(ProblemError, match="9 files are under way, max_queue is 9"):
        part.places("third").look()
    greedy.close()
    part.places("fourth").take_files(3)
    part.places("third").look()  # there is one left


def test_bytes_beyond_a_share_are_no_bar_to_files(monkeypatch: pytest.MonkeyPatch) -> None:
    part = admission(max_queue=9, max_share=0.5, max_queue_bytes=100)
    alone = part.places("greedy")
    alone.take_bytes(100)
    part.places("other")
    alone.look()
    alone.take_files(1)
    part.places("other").look()
    with pytest.raises(ProblemError, match="100 bytes are under way"):
        part.places("other").take_bytes(1)


class Client(str):
    """A name that can be watched: strings cannot."""

    __slots__ = ("__weakref__",)


def test_of_a_client_who_is_long_gone_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    go, part = at(monkeypatch), admission()
    regular, once = Client("a regular"), Client("once")
    gone = weakref.ref(once)
    for second, client in ((1000.0, regular), (1001.0, once), (1009.0, regular), (1012.0, regular)):
        go(second)
        places = part.places(client)
        places.take_files(2)
        places.take_bytes(50)
        places.close()
    del client, once
    assert gone() is None


def test_only_so_many_clients_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowd(remembered: int) -> Admission:
        monkeypatch.setattr(admission_module, "MAX_CLIENTS", remembered)
        part = admission(max_queue=8, max_share=0.5)
        part.places("other")
        part.places("greedy").take_files(4)
        part.places("greedy")
        return part

    with pytest.raises(ProblemError, match="others wait"):
        crowd(2).places("greedy").take_files(1)
    crowd(1).places("greedy").take_files(1)  # the other one, who was here first, is forgotten


def test_what_is_given_back_is_given_back_once() -> None:
    metrics = Metrics()
    part, sample = admission(metrics, max_queue=8, max_queue_bytes=100), metrics.registry.get_sample_value
    places = part.places("a")
    places.take_files(5)
    places.take_bytes(70)
    assert (sample("bridle_serve_queued"), sample("bridle_serve_upload_bytes")) == (5, 70)
    places.give_back_files()
    assert (sample("bridle_serve_queued"), sample("bridle_serve_upload_bytes")) == (0, 70)
    places.close()
    places.close()
    assert (places.files, places.bytes) == (0, 0)
    assert (sample("bridle_serve_queued"), sample("bridle_serve_upload_bytes")) == (0, 0)
    part.places("b").take_files(8)
    part.places("b").take_bytes(100)
    with pytest.raises(ProblemError, match="8 files are under way"):
        part.places("b").take_files(1)


def test_retry_after_is_half_the_time_that_those_before_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    go, part = at(monkeypatch), admission(max_queue=500, max_queue_bytes=10**9)
    go(1000.0)
    held = part.places("a")
    held.take_files(100)
    done = part.places("a")
    done.take_files(1)
    done.give_back_files()
    go(1004.0)
    assert part.retry_after == 1.0  # one answer tells no rate
    done.take_files(1)
    done.give_back_files()
    assert part.retry_after == 60.0  # half of 100 x 4 / 2
    done.take_files(2)
    done.give_back_files()
    assert part.retry_after == 0.5 * 100 * 4 / 4
    go(1002.0)
    assert part.retry_after == 0.5 * 100 * 2 / 4
    go(1000.1)
    assert part.retry_after == pytest.approx(0.5 * 100 * 0.1 / 4)
    go(1000.0)
    assert part.retry_after == 1.0
    go(1100.0)
    assert part.retry_after == 60.0
    done.take_files(200)
    done.give_back_files()  # of which the last 64 are remembered
    go(1102.56)
    assert part.retry_after == pytest.approx(2.0)
    with pytest.raises(ProblemError) as found:
        part.places("b").take_files(401)
    assert found.value.retry_after == part.retry_after


def test_a_timeout_has_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    go, part = at(monkeypatch), admission(request_timeout=5.0)
    go(1000.0)
    assert part.deadline("0.1") == 1000.1
    assert part.deadline("5") == part.deadline("5.1") == part.deadline(None) == 1005.0
    for wrong in ("0.09", "-inf", "1" + "0" * 60 + "x"):
        with pytest.raises(ProblemError, match=r"expected seconds, at least 0\.1$") as found:
            part.deadline(wrong)
        assert repr(wrong[:40]) in found.value.detail


SCRIPT = """
import sys, time
from serving.logs import dropped_lines, flush, log
began = time.monotonic()
for number in range(30_000):
    log("info", "x" * 200, number=number)
print(time.monotonic() - began, dropped_lines(), flush(0.5), flush=True)
sys.stdin.readline()
flush(20)
log("info", "again")
"""


def test_a_pipe_that_nobody_reads_holds_up_nobody_and_what_is_lost_is_told() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seconds, dropped, flushed = process.stdout.readline().split()
    assert float(seconds) < 60
    assert int(dropped) > 15_000
    assert flushed == "False"
    _, err = process.communicate("\n", timeout=300)
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[0]["number"] == 0
    assert [line["lines"] for line in lines if "dropped" in line["event"]] == [int(dropped)]
    assert lines[-1]["event"] == "again"


def test_a_process_whose_log_hangs_still_ends() -> None:
    read, write = os.pipe()
    script = "from serving.logs import log\nfor _ in range(2000): log('info', 'x' * 200)"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=write)
    os.close(write)
    assert process.wait(300) == 0
    os.close(read)
