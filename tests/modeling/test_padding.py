"""Padding behind a clip's content is never looked at, learned from or counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.config import MaskSettings, QuantizerSettings, recipe_from_mapping
from bridle.modeling.bridle import Components
from bridle.modeling.losses import cosine_similarity, masked_code_loss
from bridle.modeling.masking import draw_mask, hidden_count, split_positions
from bridle.modeling.patches import PatchShape, clip_weights, content_mask
from bridle.modeling.quantizer import ResidualQuantizer
from bridle.training.phases import EncoderPhaseJob, TokenizerPhaseJob

AUDIO, VIDEO = PatchShape(1, (16, 16)), PatchShape(3, (2, 16, 16))
CPU = torch.device("cpu")


def components(patch: PatchShape = AUDIO, decoder: str = "swin", attention: bool = True) -> Components:
    mapping = {
        "modality": "audio",
        "model": {
            "encoder": {"width": 48, "depth": 2, "heads": 3, "class_token": patch is AUDIO},
            "decoder": {"kind": decoder, "width": 32, "depth": 3, "heads": 2},
            "estimator": {"depth": 1, "attention": attention},
            "quantizer": {"codebooks": 2, "codebook_size": 8, "dim": 16},
        },
        "train": {"batch_size": 2},
        "phases": [{"kind": "cold_start"}, {"kind": "encoder", "lr": 1e-3, "steps": 1}],
    }
    return Components(recipe_from_mapping(mapping, "test").model, patch)


def started(tokenizer):
    tokenizer.quantizer.initialize(torch.randn(300, 16), torch.Generator().manual_seed(0))
    return tokenizer


def padded_batch(patch: PatchShape, sides: tuple[int, ...], steps: list[int], kind: str = "random") -> dict:
    grid = tuple(side // step for side, step in zip(sides, patch.size, strict=True))
    per_step, settings = int(np.prod(grid[1:])), MaskSettings(kind=kind, ratio=0.6)
    lists = [
        split_positions(
            draw_mask(settings, grid, np.random.default_rng(i), valid), valid * per_step, hidden_count(settings, grid)
        )
        for i, valid in enumerate(steps)
    ]
    return {
        "values": torch.randn(len(steps), patch.channels, *sides),
        "padding": torch.tensor([(grid[0] - valid) * per_step for valid in steps]),
        "visible": torch.stack([visible for visible, _ in lists]),
        "masked": torch.stack([masked for _, masked in lists]),
    }


def with_other_padding(batch: dict, patch: PatchShape, steps: list[int]) -> dict:
    """The same clips with other values behind their content."""
    values = batch["values"].clone()
    for clip, valid in zip(values, steps, strict=True):
        clip[:, valid * patch.size[0] :] = 100 * torch.randn_like(clip[:, valid * patch.size[0] :])
    return {**batch, "values": values}


GEOMETRIES = [
    (AUDIO, (128, 128), [8, 3, 1], "swin", "random"),
    (AUDIO, (144, 64), [9, 5, 1], "swin", "time_frequency"),
    (VIDEO, (8, 32, 48), [4, 2, 1], "transformer", "tube"),
]


@pytest.mark.parametrize(("patch", "sides", "steps", "decoder", "kind"), GEOMETRIES)
@pytest.mark.parametrize("attention", [True, False])
def test_nothing_that_is_learned_depends_on_what_lies_in_the_padding(patch, sides, steps, decoder, kind, attention):
    make = components(patch, decoder, attention)
    settings = make.settings.quantizer
    batch = padded_batch(patch, sides, steps, kind)
    other = with_other_padding(batch, patch, steps)
    jobs = [
        lambda: EncoderPhaseJob(make.encoder(1), make.decoder(2), started(make.tokenizer(3)), settings, CPU, False),
        lambda: TokenizerPhaseJob(started(make.tokenizer(4)), make.estimator(5), make.encoder(1), settings, CPU, False),
    ]
    for build in jobs:
        found = []
        for clips in (batch, other):
            torch.manual_seed(0)
            job = build()
            loss, metrics, codes, *_ = job.module(*job.inputs(clips))
            loss.backward()
            job.after_step(None)
            job.count(codes)
            gradients = torch.cat([p.grad.flatten() for p in job.module.parameters() if p.grad is not None])
            found.append((metrics, codes, job.usage, gradients, dict(job.module.named_buffers())))
        (metrics, codes, usage, gradients, buffers), (*others, other_gradients, other_buffers) = found
        for one, another in zip((metrics, codes, usage), others, strict=True):
            torch.testing.assert_close(another, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-3, atol=1e-5)
        for name, buffer in buffers.items():
            torch.testing.assert_close(other_buffers[name], buffer, rtol=1e-4, atol=1e-5, msg=name)
        expected = (
            batch["masked"]
            < (batch["values"][0, 0].numel() // patch.numel * patch.channels - batch["padding"])[:, None]
        )
        if job.kind == "encoder":
            assert usage.sum() == 2 * expected.sum()


@pytest.mark.parametrize(("patch", "sides", "steps", "decoder", "kind"), GEOMETRIES)
def test_codes_do_not_change_with_the_padding_behind_a_clip(patch, sides, steps, decoder, kind):
    """Other padding, more padding, none: equal codes, and latents within 1e-5."""
    tokenizer = started(components(patch).tokenizer(0)).eval()
    values = torch.randn(1, patch.channels, *sides)
    per_step = int(np.prod([side // size for side, size in zip(sides[1:], patch.size[1:], strict=True)]))
    for valid in steps:
        content = valid * per_step
        alone = values[:, :, : valid * patch.size[0]]
        latents, codes = tokenizer.latents(alone), tokenizer.codes(alone)
        for behind in (torch.zeros_like(values), 100 * torch.randn_like(values)):
            padded = torch.cat([alone, behind], dim=2)
            found = tokenizer.latents(padded, torch.tensor([content]))[:, :content]
            assert (found - latents).abs().max() < 1e-5
            assert torch.equal(tokenizer.codes(padded, torch.tensor([content]))[:, :content], codes)


def test_the_swin_decoder_gives_a_whole_clip_the_same_beside_a_padded_one():
    make = components()
    encoder, decoder = make.encoder(0), make.decoder(1)
    batch = padded_batch(AUDIO, (144, 64), [9, 4])
    valid, grid = torch.tensor([36, 16]), (9, 4)
    tokens = encoder(batch["values"], batch["visible"], valid)
    together = decoder(tokens, batch["visible"], batch["masked"], grid, valid)
    alone = decoder(encoder(batch["values"][:1], batch["visible"][:1]), batch["visible"][:1], batch["masked"][:1], grid)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@given(
    st.sampled_from([("random", (8, 6)), ("time_frequency", (9, 5)), ("tube", (5, 3, 4))]),
    st.floats(0.3, 0.8),
    st.data(),
)
def test_masks_hide_their_share_of_content_and_nothing_behind_it(kind_and_grid, ratio, data):
    kind, grid = kind_and_grid
    settings, valid = MaskSettings(kind=kind, ratio=ratio), data.draw(st.integers(1, grid[0]))
    total, per_step = int(np.prod(grid)), int(np.prod(grid[1:]))
    content, hidden = valid * per_step, hidden_count(settings, grid)
    mask = draw_mask(settings, grid, np.random.default_rng(data.draw(st.integers(0, 99))), valid)
    assert not mask[content:].any()
    assert 0 < int(mask.sum()) < content
    if kind == "random":
        assert int(mask.sum()) == min(max(round(ratio * content), 1), content - 1)
    visible, masked = split_positions(mask, content, hidden)
    assert len(masked) == hidden
    assert sorted([*visible.tolist(), *masked.tolist()]) == list(range(total))
    assert set(masked[masked < content].tolist()) == set(mask.nonzero().flatten().tolist())


def test_losses_are_means_over_clips_of_means_over_content():
    logits, codes = torch.randn(2, 4, 3, 8), torch.randint(0, 8, (2, 4, 3))
    content = content_mask(torch.tensor([3, 9]), torch.tensor([[0, 5, 1, 7], [2, 3, 4, 8]]))
    assert content.tolist() == [[True, False, True, False], [True] * 4]
    losses, accuracy = masked_code_loss(logits, codes, clip_weights(content))
    first = masked_code_loss(logits[:1, [0, 2]], codes[:1, [0, 2]])
    second = masked_code_loss(logits[1:], codes[1:])
    torch.testing.assert_close(losses, (first[0] + second[0]) / 2)
    torch.testing.assert_close(accuracy, (first[1] + second[1]) / 2)
    estimate, target = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    cosine = cosine_similarity(estimate, target, clip_weights(content))
    parts = cosine_similarity(estimate[:1, [0, 2]], target[:1, [0, 2]]) + cosine_similarity(estimate[1:], target[1:])
    torch.testing.assert_close(cosine, parts / 2)


def test_the_quantizer_counts_and_averages_content_alone():
    settings = QuantizerSettings(codebooks=3, codebook_size=8, dim=16)
    whole, padded = ResidualQuantizer(settings), ResidualQuantizer(settings)
    for quantizer in (whole, padded):
        quantizer.initialize(
            torch.randn(100, 16, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(0)
        )
        quantizer.train()
    z = torch.randn(3, 10, 16)
    content = torch.zeros(3, 10, dtype=torch.bool)
    content[:, :7] = True
    quantized, commitment = padded(z, clip_weights(content))
    plain, expected = whole(z[:, :7])
    torch.testing.assert_close(commitment, expected)
    torch.testing.assert_close(quantized.errors, plain.errors)
    torch.testing.assert_close(padded.statistics, whole.statistics, rtol=1e-5, atol=1e-6)
    assert padded.counts.sum() == 3 * 21


def test_soft_codes_share_the_target_evenly():
    logits = torch.randn(2, 4, 3, 8)
    codes = torch.stack([torch.randperm(8)[:2] for _ in range(24)]).view(2, 4, 3, 2)
    losses, accuracy = masked_code_loss(logits, codes)
    parts = [masked_code_loss(logits, codes[..., i]) for i in range(2)]
    torch.testing.assert_close(losses, (parts[0][0] + parts[1][0]) / 2)
    torch.testing.assert_close(accuracy, parts[0][1])
