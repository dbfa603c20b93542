"""Numbers of a faster way are as close to float64's; what is kept follows what it is of."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from bridle.config import QuantizerSettings, TransformerSettings
from bridle.modeling.blocks import SwinBlocks
from bridle.modeling.losses import masked_code_loss
from bridle.modeling.positions import KEPT, Positions, sincos_positions
from bridle.modeling.quantizer import ResidualQuantizer


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_loss_over_rows_of_codes_is_as_close_to_float64_as_over_an_inner_axis():
    logits, codes = 4 * drawn(2, 300, 4, 64), torch.randint(0, 64, (2, 300, 4))
    exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 2), codes.flatten(), reduction="none")
    exact = exact.view(-1, 4).mean(0)
    before = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).transpose(1, 2), codes.flatten(0, 1), reduction="none"
    )
    losses, _ = masked_code_loss(logits, codes)
    assert (losses - exact).abs().max() < 2e-6
    assert (losses - exact).abs().max() < 2 * (before.mean(0) - exact).abs().max() + 1e-6


@pytest.mark.parametrize("grid", [(8, 4), (6, 7), (3, 9)])
def test_swin_blocks_with_masks_of_their_own_give_what_timms_blocks_give(grid):
    blocks = SwinBlocks(TransformerSettings(width=24, depth=3, heads=2), window=4)
    tokens = drawn(2, grid[0] * grid[1], 24)
    expected = tokens.view(2, *grid, 24)
    for block in blocks.blocks:
        expected = SwinTransformerBlock.forward(_timms(block), expected)
    for _ in range(2):  # the second time with the mask that was kept
        assert torch.equal(blocks(tokens, grid), expected.reshape(tokens.shape))


def _timms(block) -> SwinTransformerBlock:
    found = SwinTransformerBlock(
        24, (4, 4), 2, window_size=4, shift_size=block.shift_size[0], always_partition=True, dynamic_mask=True
    )
    found.load_state_dict(block.state_dict())
    return found


def test_tables_of_positions_are_kept_for_each_grid_and_dtype_and_not_for_ever():
    positions, like = Positions(16), torch.zeros(1)
    assert torch.equal(positions((3, 4), like), sincos_positions((3, 4), 16))
    assert positions((3, 4), like) is positions((3, 4), like)
    assert positions((3, 4), like.bfloat16()).dtype == torch.bfloat16
    for side in range(2, 2 + KEPT):
        assert torch.equal(positions((side, 2), like), sincos_positions((side, 2), 16))
    assert len(positions._tables) == KEPT
    with torch.inference_mode():
        positions((5, 5), like)
    assert not positions((5, 5), like).is_inference()


def test_lookups_see_every_change_of_the_codebooks():
    quantizer = ResidualQuantizer(QuantizerSettings(codebooks=2, codebook_size=8, dim=4))
    latents = drawn(64, 4)
    quantizer.initialize(latents, torch.Generator().manual_seed(0))
    other = copy.deepcopy(quantizer)
    other.codebooks.copy_(other.codebooks.flip(1))
    state = other.state_dict()

    def codes(one: ResidualQuantizer) -> torch.Tensor:
        fresh = ResidualQuantizer(one.settings)
        fresh.load_state_dict(one.state_dict())
        assert torch.equal(fresh.encode(latents).codes, one.encode(latents).codes)
        return one.encode(latents).codes

    first = codes(quantizer)
    assert torch.equal(codes(other), 7 - first)
    quantizer.train()(latents)
    quantizer.update(None)
    codes(quantizer)
    quantizer.load_state_dict(state)
    assert torch.equal(codes(quantizer), 7 - first)
    for name, value in quantizer.state_dict().items():  # as a checkpoint is read
        value.copy_(state[name].flip(1) if name != "initialized" else state[name])
    assert torch.equal(codes(quantizer), first)
    # A copy counts its changes afresh: as many as the original had by then must not look like none.
    copied = copy.deepcopy(quantizer)
    for _ in range(quantizer.codebooks._version + 2):
        copied.codebooks.copy_(copied.codebooks.flip(1))
        codes(copied)
