"""Several sources, each seen as often as its weight says, in an order that is still a pure function."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_inputs import write_tar

from bridle.config import load_recipe
from bridle.data.errors import ShardError
from bridle.data.order import SampleOrder, Source
from bridle.data.patterns import split_weight
from bridle.data.shards import ShardSet, open_mixture, open_shards
from bridle.data.stream import Stream
from bridle.pretrain import overrides, parse
from bridle.settings import RecipeError

weights = st.sampled_from(["0.25", "0.3", "0.5", "1", "1.5", "2", "2.25", "3"]).map(Fraction)
sources = st.lists(
    st.tuples(weights, st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)), min_size=1, max_size=4
)
small = st.integers(1, 8)
Given = list[tuple[Fraction, list[int]]]


def order_of(given: Given, block: int, window: int, seed: int = 3, shuffle: bool = True) -> SampleOrder:
    counts = [count for _, shards in given for count in shards]
    return SampleOrder(counts, seed, block, window, shuffle, [Source(len(shards), w) for w, shards in given])


def seen(order: SampleOrder, first: int, end: int) -> Counter[int]:
    return Counter(order.locate(position)[1] for position in range(first, end))


def samples_of(given: Given) -> list[tuple[Fraction, range]]:
    """Weight and sample numbers of each source."""
    ends = np.cumsum([0, *(sum(shards) for _, shards in given)]).tolist()
    return [(w, range(a, b)) for (w, _), a, b in zip(given, ends, ends[1:], strict=False)]


@settings(max_examples=60, deadline=None)
@given(sources, small, small, st.booleans(), st.integers(1, 4))
def test_every_sample_is_seen_weight_times_an_epoch(
    given: Given, block: int, window: int, shuffle: bool, epochs: int
) -> None:
    order = order_of(given, block, window, shuffle=shuffle)
    found = seen(order, 0, order.begin(epochs))
    for weight, samples in samples_of(given):
        times = weight * epochs
        assert {found[i] for i in samples} <= {times // 1, -(-times // 1)}
        assert sum(found[i] for i in samples) == times * len(samples) // 1


@settings(max_examples=40, deadline=None)
@given(sources, small, small)
def test_a_fraction_comes_out_even_after_its_denominator(given: Given, block: int, window: int) -> None:
    order, epochs = order_of(given, block, window), 20  # a multiple of every denominator
    found = seen(order, 0, order.begin(epochs))
    assert all(found[i] == weight * epochs for weight, samples in samples_of(given) for i in samples)
    assert order.begin(epochs) == epochs * order.samples_per_epoch


def test_half_a_source_comes_in_one_epoch_and_the_other_half_in_the_next() -> None:
    order = order_of([(Fraction(1), [10]), (Fraction(1, 2), [20, 21])], 4, 3)
    first, second = (seen(order, order.begin(e), order.begin(e + 1)) for e in range(2))
    halves = [{i for i in found if i >= 10} for found in (first, second)]
    assert [len(half) for half in halves] == [20, 21] and halves[0] | halves[1] == set(range(10, 51))
    later = {i for i in seen(order, order.begin(2), order.begin(3)) if i >= 10}
    assert later != halves[0]  # another half in each pass


@pytest.mark.parametrize("block", [1, 2, 3, 16])
def test_an_epoch_may_take_nothing_of_a_source(block: int) -> None:
    given = [(Fraction(1), [3]), (Fraction(3, 10), [2]), (Fraction("0.001"), [17, 20])]
    order = order_of(given, block, 2)
    found = seen(order, 0, order.begin(1000))
    assert all(found[i] == weight * 1000 for weight, samples in samples_of(given) for i in samples)


@settings(max_examples=60, deadline=None)
@given(sources, small, small, st.lists(st.integers(0, 600), min_size=1, max_size=10))
def test_mixed_order_does_not_depend_on_what_was_asked_before(
    given: Given, block: int, window: int, positions: list[int]
) -> None:
    asked = order_of(given, block, window)
    shard_ends = np.cumsum([count for _, shards in given for count in shards])
    for position in positions:
        epoch, sample = asked.locate(position)
        assert (epoch, sample) == order_of(given, block, window).locate(position)
        assert asked.begin(epoch) <= position < asked.begin(epoch + 1)
        assert int(np.searchsorted(shard_ends, sample, side="right")) in asked.upcoming_shards(position)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), small, small)
def test_sources_of_weight_one_are_the_plain_order(counts: list[int], block: int, window: int) -> None:
    plain = SampleOrder(counts, 3, block, window)
    mixed = order_of([(Fraction(1), [count]) for count in counts], block, window)
    assert [plain.locate(p) for p in range(3 * sum(counts))] == [mixed.locate(p) for p in range(3 * sum(counts))]


def test_the_sources_are_mixed_within_a_window() -> None:
    order = order_of([(Fraction(1), [400]), (Fraction(3), [100])], 4, 64)
    first = [order.locate(position)[1] < 400 for position in range(200)]
    assert 60 < sum(first) < 160


def test_sources_that_do_not_fit_the_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="do not share out 2 shards"):
        SampleOrder([1, 2], 0, 1, 1, True, [Source(1)])
    with pytest.raises(ValueError, match="weights above 0"):
        SampleOrder([1, 2], 0, 1, 1, True, [Source(2, Fraction(0))])


def make(data: bytes, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {"number": torch.tensor(int(data)), "draw": torch.tensor(rng.random())}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder, number = tmp_path_factory.mktemp("mixed"), 0
    for name, counts in {"a": (11, 6), "b": (9, 4)}.items():
        for shard, count in enumerate(counts):
            write_tar(
                folder / f"{name}-{shard}.tar",
                [(f"k{i}.num", str(i).encode()) for i in range(number, number + count)],
            )
            number += count
    return open_mixture([([f"{folder}/a-*.tar"], 0.5), ([f"{folder}/b-*.tar"], 2)], extensions=["num"])


def rows(shards: ShardSet, world: int = 1, workers: int = 0, **options: int) -> dict[int, tuple[int, float]]:
    """What stands at each position, over all ranks."""
    stream = Stream(shards, make, seed=5, block=3, window=2)
    batches = [
        found
        for rank in range(world)
        for found in stream.micro_batches(rank=rank, world=world, workers=workers, **options)
    ]
    return {
        position: (int(found.tensors["number"][i]), float(found.tensors["draw"][i]))
        for found in batches
        for i, position in enumerate(found.positions)
    }


@settings(max_examples=25, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4]), batch=st.integers(1, 20), micro=st.integers(1, 6), start=st.integers(0, 150)
)
def test_mixed_batches_are_the_same_on_any_ranks_and_after_any_resume(
    mixed: ShardSet, world: int, batch: int, micro: int, start: int
) -> None:
    whole = rows(mixed, start=0, stop=160, batch_size=16, micro_batch_size=16)
    rest = rows(mixed, world, start=start, stop=160, batch_size=batch, micro_batch_size=micro)
    assert rest == {position: found for position, found in whole.items() if position >= start}


def test_mixed_stream_sees_every_sample_as_often_as_its_weight_says(mixed: ShardSet) -> None:
    whole = rows(mixed, workers=1, start=0, stop=2 * 17 // 2 + 2 * 26, batch_size=16, micro_batch_size=16)
    assert Counter(number for number, _ in whole.values()) == {i: 1 if i < 17 else 4 for i in range(30)}
    assert len({draw for _, draw in whole.values()}) == len(whole)  # a sample seen again is augmented anew


def test_a_source_without_samples_or_with_a_shard_of_another_is_refused(tmp_path: Path) -> None:
    good = str(write_tar(tmp_path / "good.tar", [("k.num", b"1")]))
    text = str(write_tar(tmp_path / "text.tar", [("k.txt", b"1")]))
    with pytest.raises(ShardError, match=r"no sample with a member of num in 1 shards .*text\.tar"):
        open_mixture([([good], 1), ([text], 2)], extensions=["num"])
    with pytest.raises(ShardError, match=r"none/\*\.tar': matches nothing"):
        open_mixture([([good], 1), ([f"{tmp_path}/none/*.tar"], 2)], extensions=["num"])
    with pytest.raises(ShardError, match=r"good\.tar: belongs to sources 0 and 1 .* one source"):
        open_mixture([([good], 1), ([good], 2)], extensions=["num"])
    with pytest.raises(ShardError, match=r"weights \[0\] .* above 0"):
        open_mixture([([good], 0)], extensions=["num"])
    assert len(open_shards([good], extensions=["num"])) == 1


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("music/*.tar@2.5", ("music/*.tar", 2.5)),
        ("builtin:audio@1", ("builtin:audio", 1.0)),
        ("speech-{000..9}.tar", ("speech-{000..9}.tar", None)),
        ("https://me@host/x.tar", ("https://me@host/x.tar", None)),
        ("https://me@host/x.tar@0.5", ("https://me@host/x.tar", 0.5)),
        ("pipe:ssh me@host cat x.tar", ("pipe:ssh me@host cat x.tar", None)),
        ("me@home.tar", ("me@home.tar", None)),
    ],
)
def test_a_weight_follows_the_last_at_sign(word: str, found: tuple[str, float | None]) -> None:
    assert split_weight(word) == found


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "heavy", "", "1e9", "1e-9"])
def test_a_bad_weight_on_the_command_line_is_one_clear_line(weight: str) -> None:
    args = parse(["--deepspeed_config", "x.json", "--data", "a.tar", f"b.tar@{weight}"])
    with pytest.raises(
        RecipeError, match=rf"shards 'b\.tar@{weight}': weight '{weight}' is not a number from 0\.001"
    ) as e:
        overrides(args)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("0", "greater than"),
        ("-2", "greater than"),
        (".nan", "finite number"),
        ("heavy", "valid number"),
        ("true", "valid"),
    ],
)
def test_a_bad_weight_in_a_recipe_is_one_clear_line(weight: str, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"'data\.sources\.0\.weight' = .*{said}") as error:
        load_recipe("audio-mini", ["data.shards=null", f"data.sources=[{{shards: [a.tar], weight: {weight}}}]"])
    assert "\n" not in str(error.value)


def test_the_command_line_mixes_and_lists() -> None:
    def data(*words: str):  # type: ignore[no-untyped-def]
        return load_recipe("audio-mini", overrides(parse(["--deepspeed_config", "x.json", *words]))).data

    mixed = data("--data", "a.tar", "b.tar@2.5", "train.batch_size=4")
    assert mixed.shards is None and mixed.heldout is None
    assert [(source.shards, source.weight) for source in mixed.mixture] == [(["a.tar"], 1.0), (["b.tar"], 2.5)]
    plain = data("--data", "a.tar", "b.tar")
    assert plain.shards == ["a.tar", "b.tar"] and plain.sources is None and len(plain.mixture) == 1
    with pytest.raises(RecipeError, match=r"either data\.shards or data\.sources"):
        load_recipe("audio-mini", ["data.sources=[{shards: [a.tar]}]"])
    with pytest.raises(RecipeError, match=r"data\.sources.*at least 1 item"):
        load_recipe("audio-mini", ["data.shards=null", "data.sources=[]"])
