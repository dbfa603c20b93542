"""What a phase trains on, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from launching import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from bridle.config import load_recipe
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape
from bridle.training.phases import EncoderPhaseJob, TokenizerPhaseJob

CPU = torch.device("cpu")


@pytest.fixture
def jobs():
    model = load_recipe(str(TINY)).model
    make = Components(model, PatchShape(1, (16, 16)))
    first, learner = make.tokenizer(0), make.tokenizer(1)
    for tokenizer in (first, learner):
        tokenizer.quantizer.initialize(torch.randn(300, 16), torch.Generator().manual_seed(0))
    encoder = EncoderPhaseJob(make.encoder(2), make.decoder(3), first, model.quantizer, CPU, bf16=False)
    tokenizer = TokenizerPhaseJob(learner, make.estimator(4), make.encoder(2), model.quantizer, CPU, bf16=False)
    return encoder, tokenizer


@pytest.fixture
def batch():
    order = torch.stack([torch.randperm(32) for _ in range(4)])
    return {"values": torch.randn(4, 1, 64, 128), "masked": order[:, :26], "visible": order[:, 26:]}


def step(job, batch):
    loss, _, codes, *_ = job.module(*job.inputs(batch))
    loss.backward()
    job.after_step(None)
    job.count(codes)


def test_the_target_tokenizer_sees_the_unmasked_clip(jobs, batch):
    encoder, _ = jobs
    _, _, masked, codes, _ = encoder.inputs(batch)
    assert codes.shape == (4, 32, 2)
    assert torch.equal(codes, encoder.tokenizer.codes(batch["values"]))
    other = {**batch, "masked": batch["visible"], "visible": batch["masked"]}
    assert torch.equal(encoder.inputs(other)[3], codes)
    assert torch.equal(masked, batch["masked"])


def test_the_loss_counts_masked_patches_only(jobs, batch):
    encoder, _ = jobs
    values, visible, masked, codes, _ = encoder.inputs(batch)
    before = encoder.module(values, visible, masked, codes)[0]
    changed = codes.clone()
    changed.scatter_(1, visible.unsqueeze(-1).expand(-1, -1, 2), 0)
    assert torch.equal(encoder.module(values, visible, masked, changed)[0], before)


def test_the_frozen_half_stays_as_it_is(jobs, batch):
    for job, frozen in ((jobs[0], jobs[0].tokenizer), (jobs[1], jobs[1].encoder)):
        before = {key: value.clone() for key, value in frozen.state_dict().items()}
        trained = {id(parameter) for parameter in job.module.parameters()}
        step(job, batch)
        assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())
        assert not any(id(p) in trained or p.requires_grad for p in frozen.parameters())
        assert not frozen.training


def test_evaluation_leaves_the_model_unchanged(jobs, batch):
    for job in jobs:
        before = {key: value.clone() for key, value in job.module.state_dict().items()}
        job.module.eval()
        with torch.no_grad():
            job.module(*job.inputs(batch))
        assert all(torch.equal(before[key], value) for key, value in job.module.state_dict().items())


class HostReads(TorchDispatchMode):
    """Counts reads of device values by the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(jobs, batch):
    for job in jobs:
        step(job, batch)  # what is looked up once, such as whether codebooks are initialised, is looked up here
        with HostReads() as reads:
            step(job, batch)
        assert reads.found == []


def test_usage_counts_codes(jobs):
    encoder, _ = jobs
    encoder.count(torch.tensor([[[0, 5], [0, 6]], [[1, 5], [2, 5]]]))
    assert encoder.usage[0, :3].tolist() == [2, 1, 1]
    assert encoder.usage[1, 5:7].tolist() == [3, 1]
    assert encoder.usage.sum() == 8
