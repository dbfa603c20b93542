"""What several HTTP processes share, each part by itself."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.fleet import share_of
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web.admission import Admission
from serving.web.counts import Counts, create
from serving.web.problems import ProblemError
from serving.web.totals import add_up


def admissions(count: int = 2, **settings: Any) -> list[Admission]:
    """As they stand in so many processes."""
    descriptor = create(count)
    made = ServeSettings(models=("x",), **settings)
    return [Admission(made, Metrics(), Counts(descriptor, number, b"salt")) for number in range(count)]


def test_places_are_those_of_all_processes() -> None:
    one, two = admissions(max_queue=8, max_queue_bytes=100, max_share=1.0)
    here, there = one.places("a"), two.places("b")
    here.take_files(5)
    here.take_bytes(60)
    with pytest.raises(ProblemError, match="5 files are under way, max_queue is 8"):
        there.take_files(4)
    with pytest.raises(ProblemError, match="60 bytes are under way, max_queue_bytes is 100"):
        there.take_bytes(41)
    there.take_files(3)
    there.take_bytes(40)
    here.give_back_files()
    here.close()
    two.places("c").take_files(5)
    with pytest.raises(ProblemError, match="8 files are under way"):
        one.places("d").take_files(1)


def test_a_share_is_that_of_all_processes_while_another_client_waits_at_any() -> None:
    one, two = admissions(max_queue=8, max_share=0.5)
    one.places("greedy").take_files(4)
    two.places("greedy").take_files(1)  # nobody else is there
    one.places("other").take_files(1)
    with pytest.raises(ProblemError, match="5 files of yours are under way, and others wait; a share is 4"):
        two.places("greedy").take_files(1)


def test_who_was_here_long_ago_waits_no_more_and_oneself_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [Counts(descriptor, number, b"s") for descriptor in [create(2)] for number in (0, 1)]
    counts[0].see("a", 100.0)
    assert not counts[1].others_wait("a", 90.0)
    assert counts[1].others_wait("b", 90.0)
    assert counts[1].others_wait("b", 99.99999)
    assert not counts[1].others_wait("b", 100.0)
    assert not counts[0].others_wait("b", 90.0)  # a process knows its own clients better
    counts[0].see("b", 101.0)
    counts[0].see("b", 102.0)
    assert counts[1].others_wait("b", 90.0)  # that is a
    assert not counts[1].others_wait("b", 100.5)


def test_what_a_dead_process_held_is_given_back_and_that_it_was_ready_stays() -> None:
    descriptor = create(2)
    counts = [Counts(descriptor, number, b"salt") for number in (0, 1)]
    counts[1].move("a", 3, 70)
    counts[1].see("a", 5.0)
    assert counts[0].taken("a") == ((3, 70), (3, 70))
    assert counts[0].taken("b") == ((3, 70), (0, 0))
    assert not counts[0].all_started
    counts[1].started()
    assert (counts[0].was_started(1), counts[0].was_started(0)) == (True, False)
    assert not counts[0].all_started
    counts[0].started()
    counts[0].forget(1)
    assert counts[0].taken("a") == ((0, 0), (0, 0))
    assert not counts[0].others_wait("b", 0.0)
    assert counts[0].was_started(1)
    assert counts[0].all_started


FIRST, SECOND, LAST = "client 2368", "client 1378", "client 18094"
"""Clients whose hashes stand at both ends of a row."""


def test_nothing_of_a_row_runs_into_what_stands_beside_it() -> None:
    descriptor = create(2)
    counts = [Counts(descriptor, number, b"salt") for number in (0, 1)]
    for own, other in ((0, 1), (1, 0)):
        for number, client in enumerate((FIRST, SECOND, LAST), start=1):
            counts[own].move(client, number, 10 * number)
        for now, client in enumerate(("a", "b"), start=100):
            counts[own].see(client, float(now))
        for number, client in enumerate((FIRST, SECOND, LAST), start=1):
            assert counts[other].taken(client) == ((6, 60), (number, 10 * number))
        assert counts[other].others_wait("b", 99.0) and not counts[other].others_wait("b", 100.0)
    counts[0].forget(1)
    assert counts[0].taken(LAST) == ((0, 0), (0, 0))
    assert counts[1].taken(LAST) == ((6, 60), (3, 30))
    assert counts[1].others_wait("a", 100.0)


@pytest.mark.parametrize("change", ["see", "take", "give back", "forget"])
def test_whoever_counts_waits_until_no_other_does(change: str) -> None:
    descriptor = create(2)
    counts = Counts(descriptor, 0, b"salt")
    part = Admission(ServeSettings(models=("x",)), Metrics(), counts)
    places = part.places("a")
    places.take_files(1)
    does = {
        "see": lambda: part.places("b"),
        "take": lambda: places.take_files(1),
        "give back": places.close,
        "forget": lambda: counts.forget(1),
    }[change]
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        with Counts(descriptor, 1, b"salt").lock():
            os.write(tell, b"!")
            time.sleep(0.1)
            os.write(tell, b"ended")
        os._exit(0)
    assert os.read(told, 1) == b"!"
    does()
    os.set_blocking(told, False)
    assert os.read(told, 16) == b"ended"
    os.waitpid(child, 0)


def test_two_processes_never_take_one_place() -> None:
    descriptor, tries = create(2), 400
    settings = ServeSettings(models=("x",), max_queue=tries, max_share=1.0)
    (told, tell), taken = os.pipe(), 0
    child = os.fork()
    part = Admission(settings, Metrics(), Counts(descriptor, int(child == 0), b"salt"))
    if child:
        assert os.read(told, 1)  # the other is at it: both are, from here on
    while True:
        try:
            part.places("me").take_files(1)
        except ProblemError:
            break
        taken += 1
        if not child and taken == 1:
            os.write(tell, b"!")
        time.sleep(0.0001)  # so that they take turns on one core too
    if not child:
        os.write(tell, str(taken).encode())
        os._exit(0)
    os.waitpid(child, 0)
    others = int(os.read(told, 16))
    assert taken
    assert tries - 1 <= taken + others <= tries


def samples(text: bytes | str) -> dict[str, float]:
    families = text_string_to_metric_families(text if isinstance(text, str) else text.decode())
    return {
        one.name + "".join(map(str, one.labels.values())): one.value for family in families for one in family.samples
    }


def counted(**tokenized: int) -> Metrics:
    metrics = Metrics()
    for status, count in tokenized.items():
        metrics.requests.labels("/tokenize", status.removeprefix("s")).inc(count)
    metrics.request_seconds.labels("/tokenize").observe(0.02)
    metrics.queued.set(3)
    metrics.ready.set(1)
    metrics.model_info.labels("m", "audio", "abc").set(1)
    return metrics


def text_of(metrics: Metrics, start: int) -> str:
    """Its text as that of a process that began then."""
    rows = metrics.text().decode().splitlines()
    told = "process_start_time_seconds "
    return "\n".join(told + str(start) if row.startswith(told) else row for row in rows) + "\n"


def test_the_metrics_of_one_process_are_its_own(tmp_path: Path) -> None:
    text = counted(s200=2).text().decode()
    assert add_up({0: text}, tmp_path / "store").decode() == text


def test_metrics_add_up_over_processes(tmp_path: Path) -> None:
    texts = {0: text_of(counted(s200=2, s429=1), 10), 1: text_of(counted(s200=5), 20)}
    found = samples(add_up(texts, tmp_path / "store"))
    assert found["bridle_serve_requests_total/tokenize200"] == 7
    assert found["bridle_serve_requests_total/tokenize429"] == 1
    assert found["bridle_serve_request_seconds_count/tokenize"] == 2
    assert found["bridle_serve_request_seconds_bucket0.025/tokenize"] == 2
    assert found["bridle_serve_request_seconds_bucket0.01/tokenize"] == 0
    assert found["bridle_serve_queued"] == 6
    assert found["bridle_serve_ready"] == found["bridle_serve_model_infoaudiomabc"] == 1
    assert found["process_start_time_seconds"] == 10


def test_counters_never_fall_when_processes_come_and_go(tmp_path: Path) -> None:
    store, first = tmp_path / "store", text_of(counted(s200=2), 10)
    add_up({0: first, 1: text_of(counted(s200=5, s500=1), 20)}, store)
    absent = samples(add_up({0: first}, store))
    assert absent["bridle_serve_requests_total/tokenize200"] == 7
    assert absent["bridle_serve_requests_total/tokenize500"] == 1
    assert absent["bridle_serve_queued"] == 3
    anew = samples(add_up({0: first, 1: text_of(counted(s200=1), 30)}, store))
    assert anew["bridle_serve_requests_total/tokenize200"] == 8
    again = samples(add_up({0: first, 1: text_of(counted(s200=4), 30)}, store))
    assert again["bridle_serve_requests_total/tokenize200"] == 11
    assert again["bridle_serve_requests_total/tokenize500"] == 1


def test_devices_decoders_cores_and_connections_are_shared_out() -> None:
    settings = ServeSettings(models=("x",), http_processes=2, decode_workers=3, max_connections=9, max_queue=7)
    devices = ["cuda:0#0", "cuda:1#1", "cuda:2#2"]
    shares = [share_of(settings, number, devices) for number in (0, 1)]
    assert [one.device for one in shares] == [("cuda:0", "cuda:2"), ("cuda:1",)]
    assert [one.decode_workers for one in shares] == [2, 2]
    assert [one.max_connections for one in shares] == [5, 5]
    assert [one.max_queue for one in shares] == [7, 7]
    assert [share_of(settings, number, ["cpu#0"]).device for number in (0, 1)] == [("cpu",), ("cpu",)]
    assert share_of(settings.model_copy(update={"threads": 3}), 0, devices).threads == 3
