"""Warm-up, then a cosine, without a jump."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.training.engine import learning_rate


@given(st.floats(1e-6, 1e-2), st.integers(1, 200), st.integers(2, 400))
def test_the_rate_rises_to_its_peak_and_falls_to_nothing_without_a_jump(peak: float, warmup: int, rest: int) -> None:
    total = warmup + rest
    rates = [learning_rate(peak, step, warmup, total) for step in range(total)]
    assert rates[warmup - 1] == pytest.approx(peak)
    assert rates[warmup] == pytest.approx(peak)
    assert max(rates) == pytest.approx(peak)
    assert all(b > a for a, b in itertools.pairwise(rates[:warmup]))
    assert all(b < a for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    steepest = max(abs(b - a) for a, b in itertools.pairwise(rates))
    assert steepest <= peak * max(1 / warmup, math.pi / 2 / rest) * (1 + 1e-9)
    assert learning_rate(peak, total, warmup, total) == pytest.approx(0.0, abs=peak * 1e-12)
    assert rates[warmup + rest // 2] == pytest.approx(peak / 2 * (1 + math.cos(math.pi * (rest // 2) / rest)))


def test_without_warm_up_it_begins_at_its_peak() -> None:
    assert learning_rate(1e-3, 0, 0, 10) == 1e-3
