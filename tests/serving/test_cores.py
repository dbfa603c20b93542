"""How model processes share the cores."""

from __future__ import annotations

import pytest

from serving.engine import cores
from serving.engine.cores import SharedCores


def test_a_batch_alone_gets_all_cores_and_batches_beside_each_other_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    monkeypatch.setattr(cores.time, "monotonic", lambda: now)
    shared = SharedCores(processes=2, threads=0)
    assert shared.take(more=False) == 8
    assert shared.take(more=False) == 4  # beside the first
    shared.give_back()
    shared.give_back()
    assert shared.take(more=False) == 4  # others were here a moment ago
    shared.give_back()
    now += 1.0
    assert shared.take(more=False) == 4
    shared.give_back()
    now += 0.01
    assert shared.take(more=False) == 8
    shared.give_back()
    assert shared.take(more=True) == 4
    shared.take(more=False)
    shared.give_back()
    now += 9.0
    assert shared.take(more=False) == 4  # one is still there
    assert SharedCores(processes=16, threads=0).take(more=True) == 1
    fixed = SharedCores(processes=2, threads=3)
    assert [fixed.take(more=False), fixed.take(more=True)] == [3, 3]
    assert (shared.counts, fixed.counts) == ([8, 4], [3])


def test_threads_that_win_a_clip_little_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    for seconds, expected in (
        ({8: 0.010, 4: 0.011}, 4),
        ({8: 1.0, 4: 1.15}, 4),
        ({8: 0.010, 4: 0.019}, 8),
        ({8: 0.020, 4: 0.010}, 4),
    ):
        shared = SharedCores(processes=2, threads=0)
        shared.learn(seconds)
        assert shared.take(more=False) == expected
        assert shared.counts == list(dict.fromkeys((expected, 4)))
