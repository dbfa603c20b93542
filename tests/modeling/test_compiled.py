"""Blocks are compiled whole, once for a shape, and compute activations again, without a change of the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from bridle.config import TrainSettings, recipe_from_mapping
from bridle.modeling.blocks import compile_blocks
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape
from bridle.training.phases import EncoderPhaseJob, PhaseJob, TokenizerPhaseJob

CPU = torch.device("cpu")
AUDIO = PatchShape(1, (16, 16))
TRAIN = {"batch_size": 2, "activation_checkpointing": True}


def components(attention: bool = True) -> Components:
    mapping = {
        "modality": "audio",
        "model": {
            "encoder": {"width": 48, "depth": 3, "heads": 3},
            "decoder": {"width": 32, "depth": 4, "heads": 2},
            "estimator": {"depth": 2, "attention": attention},
            "quantizer": {"codebooks": 2, "codebook_size": 8, "dim": 16},
        },
        "train": {"batch_size": 2},
        "phases": [{"kind": "cold_start"}, {"kind": "encoder", "lr": 1e-3, "steps": 1}],
    }
    return Components(recipe_from_mapping(mapping, "test").model, AUDIO)


def encoder_job() -> PhaseJob:
    make = components()
    tokenizer = make.tokenizer(0)
    tokenizer.quantizer.initialize(torch.randn(64, 16), torch.Generator().manual_seed(0))
    return EncoderPhaseJob(make.encoder(1), make.decoder(2), tokenizer, make.settings.quantizer, CPU, False)


def tokenizer_job() -> PhaseJob:
    make = components(attention=False)
    tokenizer = make.tokenizer(0)
    tokenizer.quantizer.initialize(torch.randn(64, 16), torch.Generator().manual_seed(0))
    return TokenizerPhaseJob(tokenizer, make.estimator(1), make.encoder(2), make.settings.quantizer, CPU, False)


def batch(padded: bool) -> dict[str, torch.Tensor]:
    order = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    found = {"values": torch.randn(2, 1, 96, 128, generator=torch.Generator().manual_seed(7))}
    found |= {"visible": order[:, :12], "masked": order[:, 12:]}
    return found | ({"padding": torch.tensor([0, 8])} if padded else {})


def numbers(job: PhaseJob, padded: bool) -> list[torch.Tensor]:
    loss, metrics, codes, *_ = job.module(*job.inputs(batch(padded)))
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in job.module.parameters() if parameter.requires_grad]
    job.module.zero_grad()
    return [loss.detach(), *metrics.values(), codes, *gradients]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("make", [encoder_job, tokenizer_job])
def test_activations_computed_again_change_no_number(make: Callable[[], PhaseJob]):
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    again = make().prepare(TrainSettings(**TRAIN))
    kept: list[list[int]] = []
    for job in (plain, again):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            job.module(*job.inputs(batch(padded=False)))
    assert sum(kept[1]) < 0.7 * sum(kept[0])
    for padded in (False, True):
        assert same(numbers(again, padded), numbers(plain, padded))


@pytest.mark.parametrize(("make", "graphs"), [(encoder_job, 4), (tokenizer_job, 3)])
def test_each_kind_of_block_is_compiled_whole_and_once(make: Callable[[], PhaseJob], graphs: int):
    """Without a graph break, the frozen half's too: encoder, frozen encoder, plain and shifted windows; teacher,
    tokenizer and estimator."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    job = make()
    torch._dynamo.reset()
    counter = CompileCounter()
    for part in [value for value in vars(job).values() if isinstance(value, torch.nn.Module)]:
        compile_blocks(part, backend=counter)
    for _ in range(2):
        assert same(numbers(job, padded=False), numbers(plain, padded=False))
    assert counter.frame_count == graphs
    assert same(numbers(job, padded=True), numbers(plain, padded=True))
    assert counter.frame_count <= 2 * graphs
    assert list(job.module.state_dict()) == list(plain.module.state_dict())
    torch._dynamo.reset()
