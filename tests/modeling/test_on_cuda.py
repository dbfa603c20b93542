"""What CUDA computes in another way than a CPU. Where there is no GPU, the part that needs none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.modeling.blocks import TransformerBlocks, compile_blocks
from bridle.modeling.lookup import cluster_sums, sums_by_product
from bridle.training.engine import prepare_device
from bridle.training.machine import stated_rate

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31))
def test_sums_as_a_product_are_those_of_points_added_one_by_one(size: int, points: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, codes = torch.randn(points, 8, generator=generator), torch.randint(size, (points,), generator=generator)
    counts, sums = sums_by_product(rows, codes, size)
    added = torch.zeros(size, 8, dtype=torch.float64).index_add_(0, codes, rows.double())
    assert torch.equal(counts, torch.bincount(codes, minlength=size).float())
    torch.testing.assert_close(sums.double(), added, atol=1e-4, rtol=1e-5)


def test_the_stated_rate_is_that_of_the_products_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        assert stated_rate(CUDA, bf16=False) == 67e12
        prepare_device(CUDA, {}, "zero2.json", say=False)
        assert stated_rate(CUDA, bf16=False) == 495e12
        assert stated_rate(CUDA, bf16=True) == 989e12
    finally:
        products.fp32_precision = before


@needs_cuda
def test_on_cuda_sums_are_the_same_every_time_and_exact_to_float32() -> None:
    rows, codes = torch.randn(32768, 256, device=CUDA), torch.randint(256, (32768,), device=CUDA)
    first, again = (cluster_sums(rows, codes, 256) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    added = torch.zeros(256, 256, dtype=torch.float64).index_add_(0, codes.cpu(), rows.cpu().double())
    torch.testing.assert_close(first[1].cpu().double(), added, atol=1e-3, rtol=1e-5)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_half_precision_gives_padded_clips_the_numbers_of_float32(compiled: bool) -> None:
    torch.manual_seed(0)
    blocks = TransformerBlocks(128, 2, 2).to(CUDA)
    content = torch.arange(320, device=CUDA) < torch.tensor([320, 200, 1, 312], device=CUDA)[:, None]
    tokens = torch.randn(4, 320, 128, device=CUDA)
    towards = torch.randn_like(tokens) * content[..., None]

    def found(half: bool) -> tuple[torch.Tensor, torch.Tensor]:
        given = tokens.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            out = blocks(given, (320,), content)
        (out.float() * towards).sum().backward()
        assert given.grad is not None
        return out.detach()[content].float(), given.grad[content]

    expected = found(half=False)
    if compiled:
        compile_blocks(blocks)
    for ours, theirs in zip(found(half=True), expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2
