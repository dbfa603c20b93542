"""Batches in a model process: begun and finished by themselves, in order, each with its own errors and slots."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_bench import SLOTS, Bench

import bridle
from bridle.model import BridleModel
from bridle.processes.framing import Line
from bridle.processes.messages import Dequantize, Fault, Forward, FromModel, Result, ToModel
from serving.workers.model_worker import serve


@pytest.fixture(scope="module")
def model(audio_folder: Path) -> BridleModel:
    return bridle.load(audio_folder)


@pytest.fixture
def bench(model: BridleModel) -> Bench:
    return Bench(model)


def test_answers_come_in_the_order_of_the_batches_begun(bench: Bench) -> None:
    expected = bench.model.codes(bench.clips).tolist()
    padded = bench.model.codes(bench.clips[:2], [bench.positions - 8] * 2).tolist()
    bench.begin("codes", [3])
    bench.begin("codes", [5, 0, 1])
    bench.begin("codes", [0, 1], padding=8)
    assert bench.codes() == [expected[3]]
    assert bench.codes() == [expected[i] for i in (5, 0, 1)]
    assert bench.codes() == padded


def test_embeddings_come_into_their_slots_when_their_batch_is_finished(bench: Bench) -> None:
    expected, before = bench.model.embed(bench.clips).flatten(1), bench.slots.clone()
    bench.begin("embed", [4, 2])
    bench.begin("embed", [1])
    assert torch.equal(bench.slots, before)  # the clips are there until then
    for slots, untouched in (([4, 2], [0, 1, 3, 5]), ([1], [0, 3, 5])):
        answer, payload = bench.pipeline.finish()
        assert isinstance(answer, Result)
        assert (answer.shape[0], len(bytes(payload))) == (len(slots), 0)
        torch.testing.assert_close(bench.slots[slots, : expected.shape[1]], expected[slots], atol=1e-5, rtol=1e-5)
        assert torch.equal(bench.slots[untouched], before[untouched])


def test_an_error_is_the_answer_of_its_batch_alone(bench: Bench) -> None:
    expected = bench.model.codes(bench.clips).tolist()
    bench.begin("codes", [0])
    wrong = np.full((2, 1), 10**6, np.int64)
    bench.pipeline.begin(Dequantize(1, [2, 1]), bytearray(wrong.tobytes()))
    bench.begin("codes", [SLOTS])
    bench.begin("codes", [1])
    assert bench.codes() == [expected[0]]
    for told in ("ValueError: codes: found 1000000", "IndexError"):
        answer, payload = bench.pipeline.finish()
        assert isinstance(answer, Fault)
        assert (told in answer.message, "Traceback" in answer.traceback, bytes(payload)) == (True, True, b"")
    assert bench.codes() == [expected[1]]


def test_a_device_that_is_lost_ends_the_process_and_one_without_memory_does_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> None:
        def codes(*_: Any) -> torch.Tensor:
            raise error

        monkeypatch.setattr(bench.model, "codes", codes)

    fails(torch.AcceleratorError("CUDA error: out of memory"))
    bench.begin("codes", [0])
    answer, _ = bench.pipeline.finish()
    assert isinstance(answer, Fault) and answer.memory
    fails(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):
        bench.begin("codes", [0])


def test_the_seconds_of_batches_under_way_add_up_to_no_more_than_it_took(bench: Bench) -> None:
    began = time.perf_counter()
    for slot in range(3):
        bench.begin("codes", [slot])
    took = [bench.pipeline.finish()[0] for _ in range(3)]
    seconds = [answer.seconds for answer in took if isinstance(answer, Result)]
    assert len(seconds) == 3 and all(each > 0 for each in seconds)
    assert sum(seconds) <= time.perf_counter() - began


class SlowDevice:
    """Stands where a pipeline does: a batch is finished when so many have begun."""

    at_once = False

    def __init__(self, together: int) -> None:
        self.together = together
        self.events: list[str] = []
        self._change = threading.Condition()
        self._begun: list[Any] = []
        self._finished = 0

    def begin(self, message: Forward, payload: bytearray) -> None:
        with self._change:
            self._begun.append(message)
            self.events.append(f"begin {message.slots[0]}")
            self._change.notify_all()

    def finish(self) -> tuple[Result, bytes]:
        with self._change:
            self._change.wait_for(lambda: len(self._begun) >= self._finished + self.together)
            message = self._begun[self._finished]
            self._finished += 1
            self.events.append(f"finish {message.slots[0]}")
        return Result(message.slots, "int32", 0.0), b""


@pytest.fixture
def lines() -> Iterator[tuple[Line, Line]]:
    ours, theirs = socket.socketpair()
    yield Line(ours, FromModel, 1 << 20), Line(theirs, ToModel, 1 << 20)
    ours.close()
    theirs.close()


def test_the_next_batch_begins_before_the_first_is_finished(lines: tuple[Line, Line]) -> None:
    service, worker = lines
    device = SlowDevice(together=2)

    def run() -> None:
        with pytest.raises(EOFError):
            serve(worker, device)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    service.until = time.monotonic() + 60
    service.send(Forward("codes", 1, [0], [1]))
    for number in range(1, 5):
        service.send(Forward("codes", 1, [number], [1]))
        answer, _ = service.receive()
        assert answer.shape == [number - 1]
    assert device.events[:3] == ["begin 0", "begin 1", "finish 0"]
    service.sock.shutdown(socket.SHUT_WR)
    thread.join(60)
    assert not thread.is_alive()
