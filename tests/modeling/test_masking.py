"""Masks hide the share they promise, the same number in every clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.config import MaskSettings
from bridle.modeling.masking import draw_mask


@given(st.integers(2, 40), st.integers(2, 16), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_random_masks_hide_the_rounded_share(rows, columns, ratio, seed):
    count = rows * columns
    hidden = round(count * ratio)
    if not 0 < hidden < count:
        return
    mask = draw_mask(MaskSettings(kind="random", ratio=ratio), (rows, columns), np.random.default_rng(seed))
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == hidden


@given(st.integers(0, 2**32 - 1))
def test_tube_masks_hide_the_same_patches_at_every_time(seed):
    mask = draw_mask(MaskSettings(kind="tube", ratio=0.9), (8, 14, 14), np.random.default_rng(seed)).view(8, 196)
    assert bool((mask == mask[0]).all())
    assert int(mask[0].sum()) == round(0.9 * 196)


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.9))
def test_time_frequency_masks_hide_whole_rows_and_columns(seed, ratio):
    mask = draw_mask(MaskSettings(kind="time_frequency", ratio=ratio), (64, 8), np.random.default_rng(seed)).view(64, 8)
    visible = ~mask
    rows, columns = visible.any(1), visible.any(0)
    assert torch.equal(visible, rows[:, None] & columns[None, :])
    assert abs(mask.float().mean().item() - ratio) < 0.1


def test_a_mask_depends_on_its_generator_alone():
    settings = MaskSettings(kind="random", ratio=0.8)
    first, again, other = (draw_mask(settings, (64, 8), np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("kind", "grid"), [("tube", (4, 4)), ("time_frequency", (2, 4, 4))])
def test_a_mask_that_does_not_fit_the_grid_is_refused(kind, grid):
    with pytest.raises(ValueError, match=r"mask\.kind"):
        draw_mask(MaskSettings(kind=kind, ratio=0.5), grid, np.random.default_rng(0))


def test_a_ratio_that_hides_nothing_is_refused():
    with pytest.raises(ValueError, match=r"mask\.ratio"):
        draw_mask(MaskSettings(kind="random", ratio=0.01), (2, 2), np.random.default_rng(0))
