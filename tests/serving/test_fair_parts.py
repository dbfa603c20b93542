"""The parts that keep the service fair, each by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web.admission import Admission
from serving.web.problems import ProblemError


def admission(**settings: Any) -> Admission:
    return Admission(ServeSettings(models=("x",), **settings), Metrics())


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


def test_the_longest_timeout_is_the_servers() -> None:
    part = admission(request_timeout=5.0)
    now = time.monotonic()
    assert part.deadline(None) == pytest.approx(now + 5, abs=0.5)
    assert part.deadline("2") == pytest.approx(now + 2, abs=0.5)
    assert part.deadline("1000") == pytest.approx(now + 5, abs=0.5)
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
    assert float(seconds) < 10
    assert int(dropped) > 15_000
    assert flushed == "False"
    _, err = process.communicate("\n", timeout=60)
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[0]["number"] == 0
    assert [line["lines"] for line in lines if "dropped" in line["event"]] == [int(dropped)]
    assert lines[-1]["event"] == "again"


def test_a_process_whose_log_hangs_still_ends() -> None:
    read, write = os.pipe()
    script = "from serving.logs import log\nfor _ in range(2000): log('info', 'x' * 200)"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=write)
    os.close(write)
    assert process.wait(30) == 0
    os.close(read)
