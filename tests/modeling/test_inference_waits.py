"""Codes, embeddings and classes are computed on a GPU without a wait for it or a copy, shown without one.

As tests/training/test_no_waiting.py shows it for training. So a service can begin a batch while another is computed.
"""

from __future__ import annotations

import pytest
import torch
from crossings import Crossings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridle.config import EncoderSettings, QuantizerSettings
from bridle.modeling.classifier import build_classifier, probabilities
from bridle.modeling.patches import PatchShape
from bridle.modeling.tokenizer import LearnedTokenizer

CUDA = torch.device("cuda:0")
ENCODER = EncoderSettings(width=48, depth=1, heads=3)
PATCH, SIDES = PatchShape(1, (16, 16)), (96, 128)


def as_on_a_gpu(module: nn.Module) -> None:
    """Puts fake tensors in place of all that it has; `Module.to` cannot make such."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    tensors[name] = nn.Parameter(fake, False) if tensors is part._parameters else fake


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_waits_for_the_gpu_nor_copies_to_or_from_it(padded: bool) -> None:
    tokenizer = LearnedTokenizer(ENCODER, QuantizerSettings(codebooks=2, codebook_size=8, dim=16), PATCH).eval()
    tokenizer.quantizer.initialize(torch.randn(64, 16), torch.Generator().manual_seed(0))
    tokenizer.quantizer.encode(torch.randn(4, 16))  # asks the device once whether it is initialized
    classifier = build_classifier(ENCODER, PATCH, 5, seed=0).eval()

    def infer() -> None:
        codes = tokenizer.codes(values, valid).to(torch.int32)
        tokenizer.quantizer.decode(codes)
        tokenizer.encoder.embeddings(values, valid).float()
        probabilities(classifier(values, valid=valid), "ce")

    with FakeTensorMode(), torch.inference_mode():
        as_on_a_gpu(tokenizer)
        as_on_a_gpu(classifier)
        values = torch.empty(2, 1, *SIDES, device=CUDA)
        valid = torch.empty(2, dtype=torch.int64, device=CUDA) if padded else None
        infer()  # makes tables of this grid and prepares the codebooks, once
        with Crossings() as crossings:
            infer()
    assert crossings.found == {}
