"""One run folder, one run."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from launching import output_of, pretrain, rows, start, wait_for_rows

from bridle.training.lock import Holder, LocalLockFile, RunHeldError, RunLock


@pytest.mark.slow
def test_a_second_start_says_who_trains_there_and_exits_2_and_the_first_goes_on(tmp_path):
    run = tmp_path / "run"
    process = start(run, "phases.1.steps=50000")
    wait_for_rows(run, 1, process)
    second = pretrain(run, "phases.1.steps=50000", check=False)
    assert second.returncode == 2, second.stdout + second.stderr
    [line] = [line for line in second.stderr.splitlines() if line.startswith("pretrain: error:")]
    assert f"process {process.pid} on " in line
    assert "--run" in line
    seen = len(rows(run))
    wait_for_rows(run, seen + 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75, output_of(run)


def elsewhere(folder: Path) -> Holder:
    """Leaves a lock as another machine would."""
    holder = replace(Holder.this(), machine="another one", host="node-7", pid=4242)
    assert LocalLockFile(folder).create(holder.text())
    return holder


def fail(why: str) -> None:
    raise AssertionError(why)


def test_a_holder_elsewhere_whose_heartbeat_moves_is_alive_whatever_its_clock_says(tmp_path):
    run = tmp_path / "run"
    file = LocalLockFile(run)
    holder = replace(Holder.this(), machine="another one", host="node-7", pid=4242, heartbeat=12.0)
    assert file.create(holder.text())

    class Watched(LocalLockFile):
        """Whenever somebody has looked, the holder beats."""

        def read(self) -> str | None:
            found = super().read()
            assert file.rewrite(replace(holder, heartbeat=17.0).text())
            return found

    with pytest.raises(RunHeldError, match="process 4242 on node-7"):
        RunLock(Watched(run), "runs/x", fail, stale=5.0).acquire()


class Clock:
    """Stands for `time`: none passes but in sleep, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_holder_elsewhere_whose_heartbeat_stands_still_is_dead_however_young_it_looks(tmp_path, monkeypatch):
    run, clock = tmp_path / "run", Clock()
    elsewhere(run)
    lock = RunLock(LocalLockFile(run), "runs/x", fail, stale=60.0)
    monkeypatch.setattr("bridle.training.lock.time", clock)
    lock.acquire()
    assert 60.0 <= clock.now < 61.0
    assert Holder.read(LocalLockFile(run).read()).is_here()
    lock.release()
    assert not (run / "lock.json").exists()


def test_a_process_with_the_dead_ones_number_is_not_taken_for_it(tmp_path):
    run = tmp_path / "run"
    stranger = replace(Holder.this(), born=Holder.this().born - 3600)
    assert LocalLockFile(run).create(stranger.text())
    lock = RunLock(LocalLockFile(run), "runs/x", fail)
    lock.acquire()
    lock.release()


def test_a_torn_lock_file_is_not_in_the_way_for_ever(tmp_path):
    (tmp_path / "lock.json").write_text('{"host": "no')
    lock = RunLock(LocalLockFile(tmp_path), "runs/x", fail, stale=0.5)
    lock.acquire()
    lock.release()


def test_who_slept_through_a_takeover_is_told_and_leaves_the_new_lock_alone(tmp_path):
    run = tmp_path / "run"
    told: list[str] = []
    sleeper = RunLock(LocalLockFile(run), "runs/x", told.append, heartbeat=3600)
    sleeper.acquire()
    text = (run / "lock.json").read_text()
    other = LocalLockFile(run)
    assert other.replace(text, elsewhere(tmp_path / "unrelated").text())
    sleeper.check()
    assert "node-7" in told[0]
    sleeper.release()
    assert "node-7" in (run / "lock.json").read_text()


def contend(run: Path, won, done) -> None:
    lock = RunLock(LocalLockFile(run), "runs/x", fail, heartbeat=0.05, stale=6.0)
    try:
        lock.acquire()
    except RunHeldError:
        return
    with won.get_lock():
        won.value += 1
    done.wait(500)


def test_of_many_that_find_a_dead_lock_at_once_one_gets_it(tmp_path):
    context = get_context("spawn")
    elsewhere(tmp_path / "run")
    won, done = context.Value("i", 0), context.Event()
    contenders = [context.Process(target=contend, args=(tmp_path / "run", won, done)) for _ in range(6)]
    for process in contenders:
        process.start()
    deadline = time.monotonic() + 400
    while sum(process.is_alive() for process in contenders) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done.set()
    for process in contenders:
        process.join()
    assert won.value == 1


def test_a_lock_that_was_given_back_leaves_no_folder_that_it_made(tmp_path):
    lock = RunLock(LocalLockFile(tmp_path / "runs" / "x"), "runs/x", fail)
    lock.acquire()
    lock.release()
    assert not (tmp_path / "runs").exists()
