"""Positions, first weights and the decoder's places, against formulas written out and orders turned around."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bridle.config import recipe_from_mapping
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape, gather_positions
from bridle.modeling.positions import sincos_positions

AUDIO = PatchShape(1, (16, 16))


def components(decoder: str) -> Components:
    mapping = {
        "modality": "audio",
        "model": {
            "size": "tiny", "decoder": {"kind": decoder}, "quantizer": {"codebooks": 2, "codebook_size": 8, "dim": 16}
        },
        "train": {"batch_size": 2},
        "phases": [{"kind": "cold_start"}, {"kind": "encoder", "lr": 1e-3, "steps": 1}],
    }  # fmt: skip
    return Components(recipe_from_mapping(mapping, "test").model, AUDIO)


@pytest.mark.parametrize(("grid", "width"), [((5,), 8), ((4, 3), 16), ((2, 3, 4), 26), ((3, 2), 11)])
def test_positions_are_sines_and_cosines_of_each_axis(grid: tuple[int, ...], width: int) -> None:
    """Of each axis in turn: sin, then cos, of place / 10000^(i / n), n = width // (2 axes); what is left stays 0."""
    n = width // (2 * len(grid))
    wanted = []
    for place in np.ndindex(*grid):
        row = []
        for where in place:
            angles = [where / 10000 ** (i / n) for i in range(n)]
            row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        wanted.append(row + [0.0] * (width - len(row)))
    torch.testing.assert_close(sincos_positions(grid, width), torch.tensor(wanted), rtol=1e-6, atol=1e-7)


def test_a_width_too_small_for_positions_is_refused_and_the_least_is_not() -> None:
    with pytest.raises(ValueError, match="width 5 is too small for positions on 3 axes; it must be 6 or more"):
        sincos_positions((2, 2, 2), 5)
    assert sincos_positions((2, 2, 2), 6).shape == (8, 6)


def test_matrices_start_xavier_uniform_biases_at_zero_and_tokens_small() -> None:
    make = components("swin")
    for module, token in ((make.encoder(0), "class_token"), (make.decoder(1), "mask_token")):
        linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
        assert len(linear) > 4
        for part in linear:
            bound = math.sqrt(6 / sum(part.weight.shape))
            assert 0.9 * bound < float(part.weight.detach().abs().max()) <= bound
            assert float(part.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert part.bias is None or not part.bias.any()
        found = getattr(module, token).detach().flatten()
        assert 0.012 < float(found.std()) < 0.028 and float(found.mean().abs()) < 0.01
    head = make.tokenizer(2).head
    assert all(not layer.bias.any() for layer in (head[0], head[2]))


@pytest.mark.parametrize("kind", ["swin", "transformer"])
def test_the_decoder_puts_each_token_where_its_patch_is_whatever_the_order(kind: str) -> None:
    make = components(kind)
    encoder, decoder = make.encoder(0).eval(), make.decoder(1).eval()
    values = torch.randn(2, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(32, generator=generator) for _ in range(2)])
    visible, masked = order[:, :10], order[:, 10:]
    logits = decoder(encoder(values, visible), visible, masked, (4, 8))
    turned, asked = torch.randperm(10, generator=generator), torch.randperm(22, generator=generator)
    again = decoder(encoder(values, visible[:, turned]), visible[:, turned], masked[:, asked], (4, 8))
    torch.testing.assert_close(again, logits[:, asked], rtol=1e-3, atol=1e-4)
    moved = visible.clone()
    moved[:, [0, 1]] = visible[:, [1, 0]]  # the same tokens, two of them said to come from one another's place
    assert (decoder(encoder(values, visible), moved, masked, (4, 8)) - logits).abs().max() > 1e-3


def test_a_class_token_is_seen_by_the_encoder_and_is_no_position_of_the_decoder() -> None:
    make = components("transformer")
    encoder, decoder = make.encoder(0).eval(), make.decoder(1).eval()
    values, visible = torch.randn(1, 1, 64, 128), torch.arange(10)[None]
    tokens = encoder(values, visible)
    assert tokens.shape[1] == 11
    changed = tokens.clone()
    changed[:, 0] += 1
    masked = torch.arange(10, 32)[None]
    assert torch.equal(decoder(changed, visible, masked, (4, 8)), decoder(tokens, visible, masked, (4, 8)))
    assert torch.equal(encoder.embeddings(values), encoder(values)[:, 1:])
    shown = gather_positions(encoder.embed(AUDIO.cut(values)), visible)
    assert shown.shape == (1, 10, encoder.width)
