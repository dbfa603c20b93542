"""The classifier's mathematics: losses, pooling, stochastic depth, layer-wise rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.loss import LabelSmoothingCrossEntropy
from torch.nn import functional

from bridle.config import EncoderSettings
from bridle.modeling.classifier import build_classifier, classification_loss, drop_factors, layer_rate
from bridle.modeling.patches import PatchShape

SETTINGS = EncoderSettings(width=24, depth=3, heads=2)
PATCH = PatchShape(1, (4, 4))


@given(seed=st.integers(0, 99), smoothing=st.sampled_from([0.0, 0.1, 0.3]))
def test_cross_entropy_with_smoothing_is_the_libraries(seed: int, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)
    found = classification_loss(logits, functional.one_hot(labels, 5).float(), "ce", smoothing)
    assert found == pytest.approx(float(LabelSmoothingCrossEntropy(smoothing)(logits, labels)), rel=1e-5)
    ours = classification_loss(logits, functional.one_hot(labels, 5).float(), "bce", smoothing)
    smoothed = functional.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    chances = logits.double().sigmoid()
    theirs = -(smoothed * chances.log() + (1 - smoothed) * (1 - chances).log()).mean()
    assert ours == pytest.approx(float(theirs), rel=1e-4)


def test_padding_and_hidden_patches_do_not_enter_the_mean() -> None:
    module = build_classifier(SETTINGS, PATCH, 7, seed=0).eval()
    module.head.weight.data.normal_()
    clip = torch.randn(1, 1, 16, 8)  # 4 x 2 patches, the last two of which become padding
    padded = clip.clone()
    padded[:, :, 12:] = 50.0
    valid = torch.tensor([6])
    assert torch.allclose(module(clip, valid=valid), module(padded, valid=valid), atol=1e-5)
    assert not torch.allclose(module(clip), module(padded), atol=1e-2)
    visible = torch.tensor([[0, 2, 5]])
    hidden = clip.clone()
    hidden[:, :, :4, 4:] = 9.0  # position 1
    assert torch.allclose(module(clip, visible), module(hidden, visible), atol=1e-5)


def test_stochastic_depth_leaves_out_whole_branches_and_keeps_their_mean() -> None:
    draws = torch.from_numpy(np.random.default_rng(0).random((4000, 5, 2), dtype=np.float32))
    factors = drop_factors(draws, 0.4)
    assert torch.allclose(factors.mean(0), torch.ones(5, 2), atol=0.05)
    shares = (factors == 0).double().mean((0, 2))
    assert torch.allclose(shares, torch.linspace(0, 0.4, 5).double(), atol=0.02)
    module = build_classifier(SETTINGS, PATCH, 7, seed=0)
    clip, none = torch.randn(2, 1, 16, 8), torch.zeros(2, 3, 2)
    bare = module.encoder.embed(PATCH.cut(clip))
    without = module.encoder(clip, branches=none)[:, 1:]
    position = module.encoder(torch.zeros_like(clip), branches=none)[:, 1:] * 0  # only its shape
    assert without.shape == bare.shape == position.shape
    assert torch.equal(module.encoder(clip, branches=torch.ones(2, 3, 2)), module.encoder(clip))
    assert not torch.allclose(without, module.encoder(clip)[:, 1:], atol=1e-3)


def test_each_layer_has_its_share_of_the_rate() -> None:
    module = build_classifier(SETTINGS, PATCH, 7, seed=0)
    rates = {name: layer_rate(name, 3, 0.5) for name, _ in module.named_parameters()}
    assert rates["head.weight"] == rates["norm.bias"] == rates["encoder.norm.weight"] == 1.0
    assert [rates[f"encoder.blocks.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert rates["encoder.embed.weight"] == rates["encoder.class_token"] == 0.0625
