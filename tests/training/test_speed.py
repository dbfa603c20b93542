"""What a row says of speed, and where else it is said."""

from __future__ import annotations

import signal
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from launching import free_port, output_of, rows, start_bare, wait_for_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bridle.training.ranks import Ranks
from bridle.training.speed import Rate, StepTimes
from bridle.training.timing import PARTS, PartTimes


class Gathered(Ranks):
    """Three ranks of which this one is the first; the others' rows are made up."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values * 1.0, values * torch.tensor([4.0, 4.0, 1, 1, 1, 2, 2])])


def test_parts_are_shares_of_the_time_and_the_slowest_rank_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # a machine's load is no fault of a share
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    times = StepTimes(Gathered(0, 3, torch.device("cpu")))
    for part, seconds in zip(PARTS, (0.02, 0.04, 0.03, 0.01, 0.01), strict=True):
        times.parts.begin(part)
        now[0] += seconds
    times.parts.begin("")
    now[0] += 0.05  # between steps: no part's
    times.steps = 2
    row = times.rates(30, Rate(flops=6.0, peak=100.0))
    assert row["step_seconds"] == pytest.approx(0.16 / 2)
    assert row["forward"] == pytest.approx((0.04 / 0.16 + 0.04 / 0.16 + 0.16 / 0.32) / 3)  # each of a rank's own time
    assert row["backward"] == pytest.approx((0.03 / 0.16 + 0.03 / 0.16 + 0.03 / 0.32) / 3)
    assert row["straggling"] == pytest.approx(4.0)
    assert row["flops_per_second"] == pytest.approx(row["samples_per_second"] * 6.0 / 3)
    assert row["mfu"] == pytest.approx(row["flops_per_second"] / 100.0)
    assert row["memory_bytes"] > 1e8
    times.reset()
    assert times.parts.seconds() == dict.fromkeys(PARTS, 0.0)


def test_rows_tensorboard_and_prometheus_say_where_the_time_of_two_ranks_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start_bare(run, f"train.prometheus_port={free_port()}", "phases.1.steps=50000")
    try:
        wait_for_rows(run, 8, ranks[0])
        url = output_of(run).partition("metrics at ")[2].split()[0]
        exported = urllib.request.urlopen(url, timeout=60).read().decode()
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.wait(300) for rank in ranks] == [75, 75]
    found = [row for row in rows(run, with_times=True) if row["split"] == "train"]
    shares = [sum(row[part] for part in PARTS) for row in found]
    assert 0.3 < max(shares) < 1.0 + 1e-9  # a rank that a busy machine kept waiting has a row of its own
    assert all(row[part] > 0 for row in found for part in PARTS)
    assert 1.0 <= min(row["straggling"] for row in found) < 50
    assert all(0 < row["mfu"] < 1.5 for row in found)
    for part in PARTS:
        assert f'bridle_train_part_seconds_total{{part="{part}"}}' in exported
    for name in ("straggling_ratio", "memory_bytes", 'flops_per_second{phase="encoder"}', 'mfu_ratio{phase="encoder"}'):
        value = exported.partition(f"\nbridle_train_{name} ")[2].split()[0]
        assert float(value) > 0
    events = EventAccumulator(str(next((run / "tensorboard").iterdir())))
    events.Reload()
    told = {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]}
    assert {*PARTS, "straggling", "memory_bytes", "flops_per_second", "mfu"} <= told


class Clock:
    """A GPU's clock, which is behind the host's, and what the host asked of it."""

    now, asked = 0.0, []


class Event:
    """Stands for `torch.cuda.Event`, which needs a GPU."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        Clock.asked.append("synchronize")

    def elapsed_time(self, later: Event) -> float:
        Clock.asked.append("elapsed_time")
        return 1e3 * (later.at - self.at)


def test_on_a_gpu_events_tell_the_time_and_nothing_is_asked_before_a_row_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now) * 1e-3)
    parts = PartTimes(torch.device("cuda"))
    for _ in range(2):
        for _ in range(3):
            for part in PARTS:
                parts.begin(part)
                Clock.now += PARTS.index(part) + 1
            parts.begin("")
            Clock.now += 100  # what lies between steps is no part's
        assert not Clock.asked
        spent = parts.seconds()
        assert Clock.asked.count("synchronize") == 1
        assert [spent[part] for part in PARTS[1:]] == [6.0, 9.0, 12.0, 15.0]
        assert spent["data_wait"] < 1.0  # the host's own time
        parts.reset()
        Clock.asked.clear()
