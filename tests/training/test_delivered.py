"""Micro-batches taken ahead are the same ones, in the same order, and no more."""

from __future__ import annotations

import torch

from bridle.config import load_recipe
from bridle.data.stream import MicroBatch
from bridle.training.clips import Delivered, Delivery, raw_modality


def test_what_is_fetched_early_comes_next_and_nothing_is_lost_at_the_end():
    taken = []

    def batches():
        for number in range(3):
            taken.append(number)
            yield MicroBatch({"values": torch.full((2, 1, 16, 128), float(number))}, [number], [])

    delivered = Delivered(batches(), Delivery(raw_modality(load_recipe("audio-mini")), torch.device("cpu")))
    seen = []
    for _ in range(3):
        batch, tensors = next(delivered)
        assert taken[-1] == batch.positions[0]  # only `fetch` looks ahead
        delivered.fetch()
        delivered.fetch()
        assert taken[-1] == min(batch.positions[0] + 1, 2)
        seen.append((batch.positions, tensors["values"].unique().tolist()))
    assert seen == [([0], [0.0]), ([1], [1.0]), ([2], [2.0])]
    assert next(delivered, None) is None
