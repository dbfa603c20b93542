"""A micro-step on a GPU waits for nothing and copies nothing between host and device, shown without one.

Tensors of FakeTensorMode have a device and no data: what would read one raises, and every operation is seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from crossings import Crossings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridle.config import JointPhase, recipe_from_mapping
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape
from bridle.modeling.target import TargetScale
from bridle.training.joint import JointPhaseJob
from bridle.training.phases import EncoderModule, EncoderPhaseJob, PhaseJob, TokenizerModule, TokenizerPhaseJob

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MODALITIES = {
    "audio": (PatchShape(1, (16, 16)), (96, 128), "swin"),
    "image": (PatchShape(3, (16, 16)), (80, 80), "swin"),
    "video": (PatchShape(3, (2, 16, 16)), (8, 48, 48), "transformer"),
}


def job_of(kind: str, modality: str) -> PhaseJob:
    patch, _, decoder = MODALITIES[modality]
    mapping = {
        "modality": modality,
        "model": {
            "encoder": {"width": 48, "depth": 1, "heads": 3},
            "estimator": {"depth": 1},
            "decoder": {"kind": decoder, "width": 32, "depth": 2, "heads": 2},
            "quantizer": {"codebooks": 2, "codebook_size": 8, "dim": 16},
        },
        "train": {"batch_size": 2},
        "phases": [{"kind": "cold_start"}, {"kind": "encoder", "lr": 1e-3, "steps": 1}],
    }
    model = recipe_from_mapping(mapping, "test").model
    make, quantizer = Components(model, patch), model.quantizer
    frozen, learner, control = (make.tokenizer(seed) for seed in range(3))
    for tokenizer in (frozen, learner, control):
        tokenizer.quantizer.initialize(torch.randn(64, 16), torch.Generator().manual_seed(0))
    if kind == "encoder":
        return EncoderPhaseJob(make.encoder(3), make.decoder(4), frozen, quantizer, CPU, bf16=False)
    if kind == "tokenizer":
        target = TargetScale(48)
        return TokenizerPhaseJob(learner, make.estimator(5), make.encoder(3), quantizer, CPU, False, target, control)
    tokenizers = TokenizerModule(learner, make.estimator(5), 1.0, TargetScale(48, follows=True))
    students = EncoderModule(make.encoder(3), make.decoder(4))
    return JointPhaseJob(students, tokenizers, JointPhase(kind="joint", lr=1, steps=1), quantizer, CPU, False, control)


def as_on_a_gpu(job: PhaseJob) -> PhaseJob:
    """The job with fake tensors in place of all that it has; `Module.to` cannot make such."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

    for root in [value for value in vars(job).values() if isinstance(value, nn.Module)]:
        for module in root.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved(buffer)
            if hasattr(module, "_known_initialized"):
                module._known_initialized = True  # asked of the device once a run
    job.usage, job.device = moved(job.usage), CUDA
    return job


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()`: torch's engine needs a GPU to begin with, the nodes that it would call do not."""
    gradients: defaultdict[object, dict[int, torch.Tensor]] = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(list(_after_their_inputs(loss.grad_fn, set()))):
        given = [gradients[node].get(i) for i in range(len(node._input_metadata))]
        found = node.apply(*given) if hasattr(node, "_forward_cls") else node(*given)
        found = found if isinstance(found, tuple) else (found,)
        for (following, i), unfit in zip(node.next_functions, found, strict=False):
            if following is not None and unfit is not None:
                wanted = following._input_metadata[i]
                gradient = unfit.sum_to_size(wanted.shape).to(wanted.dtype)
                sofar = gradients[following].get(i)
                gradients[following][i] = gradient if sofar is None else sofar + gradient


def _after_their_inputs(node, seen: set) -> Iterator[object]:
    seen.add(node)
    stack = [(node, iter(node.next_functions))]
    while stack:
        node, rest = stack[-1]
        for following, _ in rest:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append((following, iter(following.next_functions)))
                break
        else:
            stack.pop()
            yield node


def micro_step(job: PhaseJob, batch: dict[str, torch.Tensor]) -> None:
    loss, _, codes, *_ = job.module(*job.inputs(batch))
    backward(loss)
    job.count(codes)
    job.after_step(None)


@pytest.mark.parametrize("kind", ["encoder", "tokenizer", "joint"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_micro_step_neither_waits_for_the_gpu_nor_copies_to_or_from_it(modality, kind):
    patch, sides, _ = MODALITIES[modality]
    job = job_of(kind, modality)
    with FakeTensorMode():
        as_on_a_gpu(job)
        values = torch.empty(2, patch.channels, *sides, device=CUDA)
        count = patch.count(values)
        positions = torch.zeros(2, count, dtype=torch.int64, device=CUDA)
        batch = {"values": values, "visible": positions[:, count // 2 :], "masked": positions[:, : count // 2]}
        if modality == "audio":
            batch["padding"] = torch.zeros(2, dtype=torch.int64, device=CUDA)
        job.module(*job.inputs(batch))  # makes the tables of this grid, once a run
        with Crossings() as crossings:
            micro_step(job, batch)
    assert crossings.found == {}
    assert all(p.grad is not None for p in job.module.parameters() if p.requires_grad)
