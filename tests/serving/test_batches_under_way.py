"""Two batches under way at one model process: what they answer, and who fails when it dies, hangs or is left.

A process that is stopped by a signal answers nothing, so that both batches are surely under way when something happens.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running_deployment import Service, eventually, running
from small_models import write_classifier

import bridle
from bridle.classifier import load_classifier
from bridle.model_folder import BridleModel
from serving.engine.batching import Array
from serving.engine.deployment import BATCHES_UNDER_WAY
from serving.engine.errors import FaultError, ProcessEndedError
from serving.settings import ServeSettings


@pytest.fixture(scope="module")
def service(audio_folder: Path) -> Iterator[Service]:
    """One process, batches of one window; each test leaves it well."""
    with running(audio_folder) as found:
        yield found


@pytest.fixture(scope="module")
def model(audio_folder: Path) -> BridleModel:
    return bridle.load(audio_folder)


@pytest.fixture(scope="module")
def sound(model: BridleModel, sounds: list[bytes]) -> bytes:
    """Of one window, so that it is one batch."""
    return next(one for one in sounds if len(list(model.modality.windows(one))) == 1)


def test_a_gpu_has_two_batches_under_way_and_a_cpu_one_unless_set() -> None:
    assert BATCHES_UNDER_WAY == {"cpu": 1, "cuda": 2}
    assert ServeSettings(models=("m",)).batches_under_way == 0


def test_codes_and_embeddings_are_those_of_the_model(
    audio_folder: Path, model: BridleModel, sounds: list[bytes]
) -> None:
    """Codes and embeddings take turns in slots that others have just left."""
    sounds = sounds[:4]
    with running(audio_folder, max_batch=3) as service:
        whole = [model.encode(sound).numpy() for sound in sounds]
        codes = [model.tokenize(sound).codes.numpy() for sound in sounds]

        async def ask() -> list[Array]:
            asked = [service.ask(operation, sound) for sound in sounds for operation in ("embed", "codes")]
            return await asyncio.gather(*asked)

        found = service.runner.run(ask())
        for i in range(len(sounds)):
            np.testing.assert_allclose(found[2 * i][: len(whole[i])], whole[i], atol=1e-4)
            assert np.array_equal(found[2 * i + 1][: len(codes[i])], codes[i])
        service.runner.run(service.at_rest())


def test_a_killed_process_fails_both_batches_and_nobody_else(
    service: Service, model: BridleModel, sound: bytes
) -> None:
    codes = model.tokenize(sound).codes.numpy()

    async def scene() -> None:
        with service.stopped() as pid:
            first, second, third = await service.under_way(
                [service.ask("embed", sound), service.dequantize(), service.ask("codes", sound)]
            )
            os.kill(pid, signal.SIGKILL)
            for task in (first, second):
                with pytest.raises(ProcessEndedError, match="send the request again"):
                    await task
        assert np.array_equal((await third)[: len(codes)], codes)
        assert service.pid != pid
        await service.at_rest()

    service.runner.run(scene())
    again = service.runner.run(service.ask("embed", sound))
    expected = model.encode(sound).numpy()
    np.testing.assert_allclose(again[: len(expected)], expected, atol=1e-4)


def test_a_process_that_hangs_fails_both_batches_after_it_has_ended(
    audio_folder: Path, model: BridleModel, sound: bytes
) -> None:
    codes = model.tokenize(sound).codes.numpy()
    with running(audio_folder, model_seconds=5) as service:

        async def scene() -> None:
            with service.stopped() as pid:
                first, second, third = await service.under_way(
                    [service.ask("embed", sound), service.dequantize(), service.ask("codes", sound)]
                )
                for task in (first, second):
                    with pytest.raises(ProcessEndedError):
                        await task
                    assert not Path(f"/proc/{pid}").exists()
            assert np.array_equal((await third)[: len(codes)], codes)
            await service.at_rest()

        service.runner.run(scene())


def test_an_idle_process_that_ends_is_replaced_and_no_batch_fails(service: Service) -> None:
    async def scene() -> None:
        pid = service.pid
        os.kill(pid, signal.SIGKILL)
        await eventually("another takes its place", lambda: service.deployment.pids["model"] not in ([], [pid]))
        assert (await service.dequantize()).shape[0] == 5

    service.runner.run(scene())


def test_a_fault_is_its_own_batchs(service: Service) -> None:
    async def scene() -> None:
        pid, expected = service.pid, await service.dequantize(1)
        with service.stopped():
            tasks = await service.under_way([service.dequantize(10**6), service.dequantize(1)])
        with pytest.raises(FaultError, match="found 1000000"):
            await tasks[0]
        assert np.array_equal(await tasks[1], expected)
        assert service.pid == pid

    service.runner.run(scene())


def test_who_leaves_or_is_late_does_not_hold_up_the_other(service: Service, sound: bytes) -> None:
    async def scene() -> None:
        expected = await service.dequantize(1)
        taken = service.deployment.arena.slots - 1
        with service.stopped():
            leaves, stays, late = await service.under_way(
                [service.ask("embed", sound), service.dequantize(1), service.ask("codes", sound, seconds=0.2)]
            )
            leaves.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaves
            assert service.deployment.arena.free <= taken  # the process may still write into the slot
            await asyncio.sleep(0.3)
        assert np.array_equal(await stays, expected)
        with pytest.raises(TimeoutError):
            await late
        await service.at_rest()

    service.runner.run(scene())


def test_a_classifier_has_them_too(tmp_path: Path, sound: bytes) -> None:
    folder = write_classifier(tmp_path / "kinds")
    expected = load_classifier(folder).classify(sound).numpy()

    async def ask(service: Service) -> Array:
        found = service.deployment.results("classify", sound, time.monotonic() + 300)
        rows = [(values, window.valid) async for window, values, _ in found]
        return np.average([values for values, _ in rows], axis=0, weights=[valid for _, valid in rows])

    with running(folder) as service:
        np.testing.assert_allclose(service.runner.run(ask(service)), expected, atol=1e-4)
