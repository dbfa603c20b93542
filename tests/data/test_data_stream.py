"""The stream's promises: company, workers, restarts and bad samples move nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_inputs import MakeTar, write_tar

from bridle.data.errors import ShardError
from bridle.data.shards import ShardSet, open_shards
from bridle.data.stream import Corrupt, MicroBatch, Stream
from bridle.modalities.clip import UndecodableError

COUNTS = (23, 1, 40, 7)
SEED = 9


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return numbered_shards(tmp_path_factory.mktemp("numbered"), bad=set())


def numbered_shards(folder: Path, bad: set[int]) -> ShardSet:
    """Sample i holds the text of i; a bad one holds no number."""
    number = 0
    for shard, count in enumerate(COUNTS):
        members = []
        for _ in range(count):
            members.append((f"k{number}.num", b"broken" if number in bad else str(number).encode()))
            number += 1
        write_tar(folder / f"{shard}.tar", members)
    return open_shards([f"{folder}/*.tar"], extensions=["num"])


def make(data: bytes, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The number, and a draw of the position's own generator; bytes that are no number are a bad sample."""
    if not data.isdigit():
        raise UndecodableError(f"no number: {data!r}")
    return {"number": torch.tensor(int(data)), "draw": torch.tensor(rng.random())}


def killed(data: bytes, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A decoder that brings its process down."""
    if int(data) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(data, rng)


def batches(shards: ShardSet, world: int = 1, workers: int = 0, **options: int) -> list[MicroBatch]:
    """All ranks' micro-batches, rank after rank."""
    given = {"start": 0, "stop": 150, "batch_size": 16, "micro_batch_size": 16 // world, **options}
    stream = Stream(shards, make, seed=SEED, block=4, window=3)
    return [
        found
        for rank in range(world)
        for found in stream.micro_batches(rank=rank, world=world, workers=workers, **given)
    ]


def by_position(found: list[MicroBatch]) -> dict[int, tuple[int, float]]:
    """What stands at each position; no position may come twice."""
    rows = [
        (position, (int(batch.tensors["number"][i]), float(batch.tensors["draw"][i])))
        for batch in found
        for i, position in enumerate(batch.positions)
    ]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_every_sample_stands_once_in_every_epoch(shards: ShardSet) -> None:
    count = sum(COUNTS)
    found = by_position(batches(shards, stop=3 * count))
    for epoch in range(3):
        assert sorted(found[epoch * count + i][0] for i in range(count)) == list(range(count))
    draws = [draw for _, draw in found.values()]
    assert len(set(draws)) == len(draws)


@settings(max_examples=30, deadline=None)
@given(
    world=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 20),
    micro=st.integers(1, 9),
    start=st.integers(0, 100),
    length=st.integers(1, 120),
)
def test_global_batches_are_the_same_for_any_split(
    shards: ShardSet, world: int, batch: int, micro: int, start: int, length: int
) -> None:
    options = {"start": start, "stop": start + length, "batch_size": batch}
    alone = by_position(batches(shards, micro_batch_size=batch, **options))
    assert sorted(alone) == list(range(start, start + length))
    assert by_position(batches(shards, world, micro_batch_size=micro, **options)) == alone


def test_ranks_take_neighbouring_runs_of_each_step(shards: ShardSet) -> None:
    options = {"start": 5, "stop": 19, "batch_size": 8, "micro_batch_size": 2}
    stream = Stream(shards, make, seed=0, block=4, window=4)
    shares = [
        [batch.positions for batch in stream.micro_batches(rank=rank, world=2, workers=0, **options)]
        for rank in range(2)
    ]
    assert shares == [[[5, 6], [9, 10], [13, 14], [17, 18]], [[7, 8], [11, 12], [15, 16]]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0}, {"micro_batch_size": 0}, {"world": 0}, {"rank": -1}, {"rank": 2}, {"start": -1},
        {"workers": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_share_that_cannot_be_is_refused(shards: ShardSet, wrong: dict[str, int]) -> None:
    stream = Stream(shards, make, seed=0, block=4, window=4)
    right = {
        "start": 0, "stop": 2, "batch_size": 1, "micro_batch_size": 1, "world": 2, "rank": 1, "workers": 0
    }  # fmt: skip
    assert [batch.positions for batch in stream.micro_batches(**right | {"world": 1, "rank": 0})] == [[0], [1]]
    with pytest.raises(ValueError, match="no stream for batch"):
        list(stream.micro_batches(**right | wrong))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 2), (1, 3)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(shards: ShardSet, world: int, workers: int) -> None:
    assert by_position(batches(shards, world, workers)) == by_position(batches(shards))


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 149), batch=st.integers(1, 20), world=st.sampled_from([1, 2, 4]))
def test_resume_at_any_position_gives_the_same_rest(shards: ShardSet, position: int, batch: int, world: int) -> None:
    whole = by_position(batches(shards))
    rest = by_position(batches(shards, world, start=position, batch_size=batch, micro_batch_size=batch))
    assert rest == {p: found for p, found in whole.items() if p >= position}


def lineage(data: bytes, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The process that makes it, and the one that this was forked from."""
    return {"pids": torch.tensor([os.getpid(), os.getppid()])}


def test_loaders_are_not_forked_from_a_process_with_our_threads(shards: ShardSet) -> None:
    """Else one of them waits for ever, now and then (CPython's gh-112275; seen in a run of two ranks)."""
    stream = Stream(shards, lineage, seed=0, block=4, window=4)
    options = {"start": 0, "stop": 32, "batch_size": 8, "micro_batch_size": 8}
    found = list(stream.micro_batches(rank=0, world=1, workers=2, **options))
    loaders, parents = set(), set()
    for pid, parent in torch.cat([batch.tensors["pids"] for batch in found]).tolist():
        loaders.add(pid)
        parents.add(parent)
    assert len(loaders) == 2 and os.getpid() not in loaders | parents


def test_reading_moves_no_global_generator(shards: ShardSet) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(shards)
    batches(shards, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=15, deadline=None)
@given(bad=st.sets(st.integers(0, sum(COUNTS) - 1), min_size=1, max_size=12))
def test_a_corrupt_sample_moves_nobody_else(shards: ShardSet, bad: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        damaged = numbered_shards(Path(folder), bad)
        found = batches(damaged)
        good, order = by_position(batches(shards)), Stream(damaged, make, seed=SEED, block=4, window=3).order
        count = sum(COUNTS)
        for position, (number, draw) in by_position(found).items():
            epoch = position // count
            successors = (epoch * count + (position + i) % count for i in range(count))
            assert number == next(n for p in successors if (n := order.locate(p)[1]) not in bad)
            assert draw == good[position][1]
        named = sorted((bad_one.position, bad_one.key) for batch in found for bad_one in batch.corrupt)
        assert named == sorted((p, f"k{n}") for p, (n, _) in good.items() if n in bad)


def test_corrupt_samples_are_named_with_shard_key_and_error(tmp_path: Path) -> None:
    found = batches(numbered_shards(tmp_path, {30}), stop=sum(COUNTS))
    (corrupt,) = [corrupt for batch in found for corrupt in batch.corrupt]
    assert isinstance(corrupt, Corrupt)
    assert (corrupt.shard, corrupt.key) == (str(tmp_path / "2.tar"), "k30")
    assert "no number" in corrupt.error


def test_a_sample_cut_off_after_opening_is_a_corrupt_sample(tmp_path: Path) -> None:
    shards = numbered_shards(tmp_path, set())
    assert shards.read(0).data == b"0"
    last = tmp_path / "3.tar"
    shards.read(len(shards) - 1)
    os.truncate(last, 6 * 1024 + 512)
    found = batches(shards, stop=sum(COUNTS))
    (corrupt,) = [corrupt for batch in found for corrupt in batch.corrupt]
    assert corrupt.key == "k70" and "0 bytes, expected 2; the shard was cut" in corrupt.error


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_samples_ends_with_a_clear_error(tmp_path: Path, workers: int) -> None:
    shards = numbered_shards(tmp_path, set(range(sum(COUNTS))))
    told = rf"sample 'k\d+' \(no number.* {sum(COUNTS) - 1} samples behind it are corrupt; run `bridle"
    with pytest.raises(ShardError, match=told) as error:
        batches(shards, workers=workers)
    assert "\n" not in str(error.value)


def test_a_shard_that_goes_away_ends_the_stream_with_its_name(tmp_path: Path) -> None:
    shards = numbered_shards(tmp_path, set())
    (tmp_path / "2.tar").unlink()
    with pytest.raises(ShardError, match=r"2\.tar: No such file or directory; .* put it back"):
        batches(shards, workers=1)


def test_a_killed_worker_is_an_error_not_a_hang(shards: ShardSet) -> None:
    stream = Stream(shards, killed, seed=0, block=4, window=4)
    options = {"start": 0, "stop": 150, "batch_size": 8, "micro_batch_size": 8}
    with pytest.raises(ShardError, match=r"a loader process died .*fewer workers"):
        for _ in stream.micro_batches(rank=0, world=1, workers=2, **options):
            pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (
            signal.SIGSEGV,
            r"died \(SIGSEGV\): most likely a decoder that crashed on a damaged file; `bridle shards check",
        ),
        (signal.SIGKILL, r"died \(SIGKILL\), as the kernel ends one where memory runs out; try fewer workers"),
        (signal.SIGBUS, r"died \(SIGBUS\): no room in shared memory; .*--shm-size"),
    ],
)
def test_a_loader_that_dies_says_what_happened(shards: ShardSet, number: signal.Signals, says: str) -> None:
    stream = Stream(shards, partial(dying, number=number), seed=0, block=4, window=4)
    with pytest.raises(ShardError, match=says):
        for _ in stream.micro_batches(start=0, stop=150, batch_size=8, micro_batch_size=8, rank=0, world=1, workers=2):
            pass


def dying(data: bytes, rng: np.random.Generator, *, number: signal.Signals) -> dict[str, torch.Tensor]:
    """A decoder that ends its process."""
    os.kill(os.getpid(), number)
    raise AssertionError("still alive")


def stumbling(data: bytes, rng: np.random.Generator, *, kind: type[Exception]) -> dict[str, torch.Tensor]:
    """A decoder with a fault of its own."""
    raise kind("a fault in the program")


@pytest.mark.parametrize(("workers", "kind"), [(0, RuntimeError), (0, ValueError), (1, ValueError)])
def test_a_fault_in_the_program_is_no_corrupt_sample(shards: ShardSet, workers: int, kind: type[Exception]) -> None:
    stream = Stream(shards, partial(stumbling, kind=kind), seed=0, block=4, window=4)
    options = {"start": 0, "stop": 150, "batch_size": 8, "micro_batch_size": 8}
    with pytest.raises(kind, match="a fault in the program"):
        next(stream.micro_batches(rank=0, world=1, workers=workers, **options))
    assert not multiprocessing.active_children()


def test_more_shards_than_files_may_be_open(tmp_path: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridle.data.shards.SHARDS_OPEN", 3)
    for i in range(12):
        make_tar(tmp_path / f"{i:02}.tar", [(f"k{i}.num", str(i).encode())])
    shards = open_shards([f"{tmp_path}/{{00..11}}.tar"], extensions=["num"])
    for _ in range(2):
        assert [shards.read(i).data for i in range(12)] == [str(i).encode() for i in range(12)]
    assert len(shards._open) == 3


PROGRAM = """
from bridle.data.shards import open_shards
from bridle.data.stream import Stream
import torch

def make(data, rng):
    return {"size": torch.tensor(len(data))}

def micro_batches():
    shards = open_shards(["builtin:audio"], extensions=["flac", "ogg"])
    stream = Stream(shards, make, seed=0, block=4, window=4)
    return stream.micro_batches(start=0, stop=None, batch_size=4, micro_batch_size=4, rank=0, world=1, workers=2)

if __name__ == "__main__":
"""


def program(folder: Path, text: str) -> list[str]:
    """A script, since loaders import the main module again."""
    script = folder / "program.py"
    script.write_text(PROGRAM + textwrap.indent(text, "    "))
    return [sys.executable, str(script)]


def test_a_program_that_ends_with_a_stream_open_does_not_hang(tmp_path: Path) -> None:
    ends = """
batches = micro_batches()
next(batches)
import atexit; atexit.register(lambda kept=batches: None)
"""
    subprocess.run(program(tmp_path, ends), check=True, timeout=300)


def test_loaders_live_through_the_signals_of_their_group_and_end_with_a_killed_parent(tmp_path: Path) -> None:
    waits = """
import multiprocessing, signal, time
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
batches = micro_batches()
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
while len(got) < 2:
    time.sleep(0.01)
for _ in range(50):
    next(batches)
print("went on", flush=True)
time.sleep(60)
"""
    command = program(tmp_path, waits)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        loaders = [int(pid) for pid in process.stdout.readline().split()]
        assert len(loaders) == 2
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "went on\n"
        process.kill()
    deadline = time.monotonic() + 200
    while any(Path(f"/proc/{pid}").exists() for pid in loaders):
        assert time.monotonic() < deadline, "a loader outlives its parent"
        time.sleep(0.1)


def test_a_sample_draws_other_numbers_in_every_epoch(shards: ShardSet) -> None:
    """Without shuffling, so that it also stands at the same place of each epoch."""
    stream = Stream(shards, make, seed=SEED, block=4, window=2, shuffle=False)
    total = sum(COUNTS)
    found = list(
        stream.micro_batches(
            start=0, stop=3 * total, batch_size=total, micro_batch_size=total, rank=0, world=1, workers=0
        )
    )
    assert all(batch.tensors["number"].tolist() == list(range(total)) for batch in found)
    draws = torch.stack([batch.tensors["draw"] for batch in found])
    assert len(draws.unique()) == 3 * total
