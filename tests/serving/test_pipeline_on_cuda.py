"""On a GPU a batch is received and copied while another is computed: the host waits for nothing but its own answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_bench import SLOTS, Bench
from running_deployment import running

import bridle
from bridle.processes.messages import Dequantize, Fault, Result
from serving.engine.batching import Array

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
A_WHILE = 2_000_000_000
"""Cycles of a GPU: about a second, in which a host begins many batches."""


@pytest.fixture
def bench(audio_folder: Path) -> Bench:
    """After a warm-up, so that torch has all memory that it will need: to get more of it may wait."""
    bench = Bench(bridle.load(audio_folder, device="cuda:0"))
    for _ in range(2):
        assert [answer for answer in of_every_kind(bench) if isinstance(answer, Fault)] == []
    return Bench(bench.model)


def of_every_kind(bench: Bench) -> Iterator[Result | Fault]:
    """Begins batches of every kind; gives their answers when they are asked for."""
    for padding in (0, 8):
        bench.begin("codes", [0, 1, 2], padding)
        bench.begin("embed", [3, 4, 5], padding)
    bench.pipeline.begin(Dequantize(1, [5, 4]), bytearray(np.ones((5, 4), np.int64).tobytes()))
    return (bench.pipeline.finish()[0] for _ in range(5))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_answers_are_the_models_whatever_else_is_under_way(bench: Bench) -> None:
    slots = [[3, 1], [0], [5, 4, 2, 0], [2]]
    batches = [(chosen, padding) for chosen in slots for padding in (0, 8)]
    valid = [[bench.positions - padding] * len(chosen) for chosen, padding in batches]
    expected = [bench.model.codes(bench.clips[c], v).tolist() for (c, _), v in zip(batches, valid, strict=True)]
    for _ in range(10):
        bench.begin("codes", *batches[0])
        for before, following in enumerate(batches[1:]):
            bench.begin("codes", *following)
            assert bench.codes() == expected[before]
        assert bench.codes() == expected[-1]


def test_embeddings_come_into_the_slots_of_their_own_clips(bench: Bench) -> None:
    before = bench.slots.clone()
    expected = {slot: bench.model.embed(bench.clips[[slot]]).flatten().cpu() for slot in range(SLOTS - 1)}
    bench.begin("embed", [4, 2])
    bench.begin("embed", [0, 1, 3])
    for _ in range(2):
        assert isinstance(bench.pipeline.finish()[0], Result)
    for slot, embedding in expected.items():
        torch.testing.assert_close(bench.slots[slot, : len(embedding)], embedding, atol=1e-3, rtol=1e-3)
    assert torch.equal(bench.slots[SLOTS - 1], before[SLOTS - 1])


def test_to_begin_a_batch_the_host_waits_for_no_other(bench: Bench) -> None:
    torch.cuda.synchronize()
    torch.cuda._sleep(A_WHILE)
    with waiting_is_an_error():
        answers = of_every_kind(bench)
    assert not torch.cuda.current_stream().query(), "the host has waited for the device"
    assert [answer for answer in answers if isinstance(answer, Fault)] == []


def test_a_batch_is_finished_while_the_next_is_computed(bench: Bench) -> None:
    expected = bench.model.codes(bench.clips[[0]]).tolist()
    torch.cuda.synchronize()
    bench.begin("codes", [0])
    torch.cuda._sleep(A_WHILE)
    bench.begin("codes", [0])
    assert bench.codes() == expected
    assert not torch.cuda.current_stream().query(), "the host has waited for the next batch"
    assert bench.codes() == expected


def test_an_error_is_the_answer_of_its_batch_alone(bench: Bench) -> None:
    expected = bench.model.codes(bench.clips[[0]]).tolist()
    bench.begin("codes", [0])
    bench.pipeline.begin(Dequantize(1, [1, 1]), bytearray(np.full((1, 1), 10**6, np.int64).tobytes()))
    bench.begin("codes", [SLOTS])
    bench.begin("codes", [0])
    assert bench.codes() == expected
    assert all(isinstance(bench.pipeline.finish()[0], Fault) for _ in range(2))
    assert bench.codes() == expected


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_service_on_a_gpu_answers_as_the_model_does(audio_folder: Path, sounds: list[bytes], compiled: bool) -> None:
    model = bridle.load(audio_folder, device="cuda:0")
    with running(audio_folder, device=("cuda:0",), batches_under_way=0, max_batch=2, compile=compiled) as service:

        async def ask() -> list[Array]:
            return await asyncio.gather(*(service.ask("embed", sound) for sound in sounds))

        for sound, found in zip(sounds, service.runner.run(ask()), strict=True):
            expected = model.encode(sound).numpy()
            np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-2)
        service.runner.run(service.at_rest())
