"""Encoder, decoders, tokenizers and estimator, at the sizes and geometries that recipes ask for."""

from __future__ import annotations

import pytest
import torch

from bridle.config import load_recipe, recipe_from_mapping
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape, gather_positions
from bridle.modeling.positions import sincos_positions
from bridle.training.phases import EncoderPhaseJob, TokenizerPhaseJob

AUDIO, IMAGE, VIDEO = PatchShape(1, (16, 16)), PatchShape(3, (16, 16)), PatchShape(3, (2, 16, 16))


def tiny(**model):
    mapping = {
        "modality": "audio",
        "model": {"size": "tiny", "quantizer": {"codebooks": 2, "codebook_size": 8, "dim": 16}, **model},
        "train": {"batch_size": 2},
        "phases": [{"kind": "cold_start"}, {"kind": "encoder", "lr": 1e-3, "steps": 1}],
    }
    return recipe_from_mapping(mapping, "test").model


def test_the_audio_recipe_has_the_papers_depths_and_widths():
    make = Components(load_recipe("audio").model, AUDIO)
    encoder, decoder = make.encoder(0), make.decoder(0)
    assert len(encoder.blocks.blocks) == 12
    assert encoder.width == 768
    assert len(decoder.blocks.blocks) == 16
    assert decoder.width == 512
    assert decoder.head.out_features == 4 * 256


@pytest.mark.parametrize(
    ("patch", "size", "decoder", "class_token"),
    [
        (AUDIO, (64, 128), {"kind": "swin"}, True),
        (AUDIO, (208, 128), {"kind": "swin"}, True),
        (IMAGE, (224, 224), {"kind": "swin"}, True),
        (IMAGE, (48, 80), {"kind": "transformer"}, True),
        (VIDEO, (4, 32, 48), {"kind": "transformer"}, False),
    ],
)
def test_every_geometry_takes_a_step_of_both_phases(patch, size, decoder, class_token):
    model = tiny(
        decoder={"width": 64, "depth": 2, "heads": 2, **decoder},
        encoder={"width": 96, "depth": 2, "heads": 3, "class_token": class_token},
    )
    make, device = Components(model, patch), torch.device("cpu")
    values = torch.randn(2, patch.channels, *size)
    count = patch.cut(values).shape[1]
    cold = make.cold_start_tokenizer(0)
    cold.quantizer.initialize(cold.latents(values).flatten(0, 1), torch.Generator().manual_seed(0))
    encoder_job = EncoderPhaseJob(make.encoder(1), make.decoder(2), cold, model.quantizer, device, bf16=False)
    order = torch.stack([torch.randperm(count) for _ in range(2)])
    hidden = count * 4 // 5
    loss, metrics, _ = encoder_job.module(
        *encoder_job.inputs({"values": values, "masked": order[:, :hidden], "visible": order[:, hidden:]})
    )
    loss.backward()
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder_job.module.parameters())

    learner = make.tokenizer(3)
    learner.quantizer.initialize(learner.latents(values).flatten(0, 1).detach(), torch.Generator().manual_seed(0))
    tokenizer_job = TokenizerPhaseJob(learner, make.estimator(4), make.encoder(1), model.quantizer, device, bf16=False)
    before = learner.quantizer.codebooks.clone()
    loss, metrics, codes, _ = tokenizer_job.module(*tokenizer_job.inputs({"values": values}))
    loss.backward()
    tokenizer_job.after_step(None)
    assert codes.shape == (2, count, 2)
    assert all(torch.isfinite(value).all() for value in metrics.values())
    gradients = {name: p.grad for name, p in tokenizer_job.module.named_parameters()}
    # The class token only reaches the patches through attention, in every block but a last one without patches.
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert not torch.equal(before, learner.quantizer.codebooks)


def test_the_swin_decoder_is_not_hard_wired_to_one_grid():
    make = Components(tiny(), AUDIO)
    encoder, decoder = make.encoder(0), make.decoder(1)
    for frames in (512, 1024, 240):
        values = torch.randn(1, 1, frames, 128)
        grid = AUDIO.grid(values)
        order = torch.randperm(grid[0] * grid[1])[None]
        visible, masked = order[:, :10], order[:, 10:]
        logits = decoder(encoder(values, visible), visible, masked, grid)
        assert logits.shape == (1, masked.shape[1], 2, 8)


def test_the_decoder_sees_swin_windows_not_global_attention():
    """A patch far outside the receptive field of two shifted windows changes nothing."""
    make = Components(tiny(), IMAGE)
    encoder, decoder = make.encoder(0).eval(), make.decoder(1).eval()
    values = torch.randn(1, 3, 256, 256)
    grid = IMAGE.grid(values)
    visible, masked = torch.tensor([[0, 255]]), torch.arange(1, 255)[None]
    tokens = encoder(values, visible)
    moved = tokens.clone()
    moved[:, -1] += 1.0
    difference = (decoder(tokens, visible, masked, grid) - decoder(moved, visible, masked, grid)).abs().amax((0, 2, 3))
    changed = masked[0, difference > 0]
    assert 0 < len(changed) < 100
    assert (changed // 16).min() >= 6


def test_positions_of_neighbours_are_nearer_than_of_strangers():
    grid = (64, 8)
    table = sincos_positions(grid, 96).view(*grid, 96)
    step_time = (table[1:] - table[:-1]).norm(dim=-1).max()
    step_frequency = (table[:, 1:] - table[:, :-1]).norm(dim=-1).max()
    assert step_time < (table[32:] - table[:-32]).norm(dim=-1).min()
    assert step_frequency < (table[:, 4:] - table[:, :-4]).norm(dim=-1).min()


def test_positions_follow_the_order_of_patches():
    """Moving content along time moves the table's time half and not its frequency half, and the other way round."""
    table = sincos_positions((4, 3), 16)
    values = torch.zeros(1, 1, 64, 48)
    values[:, :, 32:48, 16:32] = 1.0
    index = AUDIO.cut(values)[0].sum(-1).argmax().item()
    assert index == 2 * 3 + 1
    row = table.view(4, 3, 16)[2]
    assert torch.equal(row[0, :8], row[2, :8])
    assert not torch.equal(row[0, 8:], row[2, 8:])


def test_cutting_loses_nothing():
    values = torch.randn(2, 3, 4, 32, 48)
    patches = VIDEO.cut(values)
    assert patches.shape == (2, 2 * 2 * 3, 3 * 2 * 16 * 16)
    assert torch.equal(patches.flatten().sort().values, values.flatten().sort().values)
    first = patches[0, 0].view(3, 2, 16, 16)
    assert torch.equal(first, values[0, :, :2, :16, :16])


def test_a_clip_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="multiple of the patch"):
        AUDIO.cut(torch.zeros(1, 1, 100, 128))
    with pytest.raises(ValueError, match="expected"):
        AUDIO.cut(torch.zeros(1, 3, 64, 128))


def test_cold_start_targets_do_not_know_where_a_patch_is():
    make = Components(tiny(), AUDIO)
    cold = make.cold_start_tokenizer(0)
    cold.quantizer.initialize(torch.randn(64, 16), torch.Generator().manual_seed(0))
    values = torch.randn(1, 1, 64, 128)
    rolled = values.roll(32, dims=2)
    codes = cold.codes(values).view(4, 8, 2)
    assert torch.equal(cold.codes(rolled).view(4, 8, 2), codes.roll(2, dims=0))


def test_the_masked_encoder_does_not_see_masked_patches():
    make = Components(tiny(), AUDIO)
    encoder = make.encoder(0)
    values = torch.randn(1, 1, 64, 128)
    visible = torch.tensor([[0, 3, 17]])
    changed = values.clone()
    changed[:, :, 16:32, 16:32] = 9.0  # patch 1*8+1 = 9
    assert torch.equal(encoder(values, visible), encoder(changed, visible))
    assert not torch.equal(encoder.embeddings(values), encoder.embeddings(changed))


def test_weights_depend_on_the_seed_alone():
    make = Components(tiny(), AUDIO)
    torch.manual_seed(1)
    first = make.encoder(5).state_dict()
    torch.rand(100)
    second = make.encoder(5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(make.encoder(6).embed.weight, first["embed.weight"])


def test_gather_positions_picks_rows():
    tokens = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(gather_positions(tokens, index)[1, 0], tokens[1, 1])
    assert torch.equal(gather_positions(tokens, index)[0, 0], tokens[0, 3])


def test_a_visible_patch_keeps_the_position_that_it_has_in_the_clip():
    """All patches shown in another order: the same embeddings in that order."""
    encoder = Components(tiny(), AUDIO).encoder(0).eval()
    values = torch.randn(2, 1, 64, 128)
    order = torch.stack([torch.randperm(32) for _ in range(2)])
    shown = encoder(values, order)[:, 1:]
    torch.testing.assert_close(shown, gather_positions(encoder.embeddings(values), order), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [True, False])
def test_the_estimator_knows_where_a_code_stands(attention):
    """The same code everywhere: the embeddings that it predicts differ from position to position."""
    estimator = Components(tiny(estimator={"depth": 2, "attention": attention}), AUDIO).estimator(0).eval()
    found = estimator(torch.randn(1, 1, 16).expand(1, 32, 16), (4, 8))[0]
    assert torch.pdist(found).min() > 1e-3


def test_a_position_wise_estimator_predicts_each_position_from_its_own_code():
    estimator = Components(tiny(estimator={"depth": 2, "attention": False}), AUDIO).estimator(0).eval()
    quantized = torch.randn(2, 32, 16)
    changed = quantized.clone()
    changed[:, 5] += 1.0
    moved = (estimator(changed, (4, 8)) - estimator(quantized, (4, 8))).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [5]
