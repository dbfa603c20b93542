"""Layouts are bijections between codes and ids, in the orders that published models use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bridle.tokens.layouts import LAYOUTS, TokenError, Vocabulary, from_text, text_vocabulary, to_text


@st.composite
def streams(draw: st.DrawFn) -> tuple[Vocabulary, np.ndarray]:
    books, size = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    vocabulary = Vocabulary(books, size, draw(st.integers(0, 200_000)))
    codes = draw(arrays(np.int64, (draw(st.integers(0, 12)), books), elements=st.integers(0, size - 1)))
    return vocabulary, codes


@pytest.mark.parametrize("layout", LAYOUTS)
@given(stream=streams())
def test_every_layout_is_undone_by_its_inverse(layout: str, stream: tuple[Vocabulary, np.ndarray]) -> None:
    vocabulary, codes = stream
    ids = vocabulary.flatten(codes, layout)
    assert ids.size == 0 or (ids.min() >= vocabulary.offset and ids.max() <= vocabulary.hole)
    assert (vocabulary.unflatten(ids, layout) == codes).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@given(stream=streams())
def test_text_tokens_are_undone_and_stand_at_their_ids(layout: str, stream: tuple[Vocabulary, np.ndarray]) -> None:
    vocabulary, codes = stream
    text = to_text("audio", codes, vocabulary, layout)
    modality, back = from_text(text, vocabulary, layout)
    assert modality == "audio"
    assert (back == codes).all()
    words = text_vocabulary("audio", vocabulary.codebooks, vocabulary.codebook_size)
    ids = np.concatenate(([vocabulary.begin], vocabulary.flatten(codes, layout), [vocabulary.end]))
    assert "".join(words[i - vocabulary.offset] for i in ids) == text
    assert len(words) == vocabulary.size


def test_orders_are_the_published_ones() -> None:
    codes = [[0, 1, 2], [3, 4, 5]]
    vocabulary = Vocabulary(3, 10, 100)
    assert vocabulary.flatten(codes).tolist() == [100, 111, 122, 103, 114, 125]
    assert vocabulary.flatten(codes, "coarse_first").tolist() == [100, 103, 111, 114, 122, 125]
    hole = 130
    assert vocabulary.hole == hole
    assert vocabulary.flatten(codes, "delay").tolist() == [
        100, hole, hole, 103, 111, hole, hole, 114, 122, hole, hole, 125,
    ]  # fmt: skip


@given(stream=streams(), data=st.data())
def test_any_delays_are_undone(stream: tuple[Vocabulary, np.ndarray], data: st.DataObject) -> None:
    vocabulary, codes = stream
    delays = data.draw(st.lists(st.integers(0, 5), min_size=vocabulary.codebooks, max_size=vocabulary.codebooks))
    ids = vocabulary.flatten(codes, "delay", delays=delays)
    assert (vocabulary.unflatten(ids, "delay", delays=delays) == codes).all()


@pytest.mark.parametrize(
    "ids, layout",
    [
        ([100, 111], "interleaved"),
        ([100, 111, 130], "interleaved"),
        ([111, 100, 122], "interleaved"),
        ([99, 111, 122], "interleaved"),
        ([100.5, 111, 122], "interleaved"),
        ([100, 111, 122], "delay"),
        ([[100, 111, 122]], "interleaved"),
        ([100, 111, 122], "sideways"),
    ],
)
def test_ids_that_no_layout_wrote_are_refused(ids: list[int], layout: str) -> None:
    with pytest.raises(TokenError):
        Vocabulary(3, 10, 100).unflatten(ids, layout)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<|audio|>",
        "<|audio|><|audio:0:1|>",
        "<|audio|><|image:0:1|><|/audio|>",
        "<|audio|><|audio:0:10|><|/audio|>",
        "<|audio|><|audio:1:1|><|/audio|>",
        "<|audio|> <|audio:0:1|><|/audio|>",
        "<|audio|><|audio:0:1|><|/audio|>x",
        "<|audio|><|audio|><|/audio|>",
        "<|audio:0:1|><|/audio|>",
        "<|audio|><|/audio:0:1|><|/audio|>",
        "<|audio|><|/audio|><|/audio|>",
    ],
)
def test_text_that_no_layout_wrote_is_refused(text: str) -> None:
    with pytest.raises(TokenError):
        from_text(text, Vocabulary(1, 10))


def test_codes_out_of_range_are_refused() -> None:
    for codes in ([[10]], [[-1]], [1], [[1, 2]], [[0.5]], [[1], [1, 2]], [[True]]):
        with pytest.raises(TokenError):
            Vocabulary(1, 10).flatten(codes)
