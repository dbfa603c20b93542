"""Real processes joined by gloo learn the codebooks that one process learns."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quantizer_reference import random_latents
from safetensors.torch import load_file, save_file

from bridle.config import QuantizerSettings
from bridle.modeling.quantizer import ResidualQuantizer

STEPS, BATCH, DIM = 4, 64, 8
SETTINGS = QuantizerSettings(codebooks=3, codebook_size=16, dim=DIM, decay=0.8)


def train(rank, world, micro_batches, gather, all_reduce):
    """Start on the first global batch and learn from the rest; each rank sees its share only."""
    quantizer = ResidualQuantizer(SETTINGS)
    for step in range(STEPS):
        share = random_latents(step, BATCH, DIM).chunk(world)[rank]
        if step == 0:
            quantizer.initialize(gather(share), torch.Generator().manual_seed(0))
        for part in share.chunk(micro_batches):
            quantizer(part)
        quantizer.update(all_reduce)
    return quantizer


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)

    def gather(share):
        parts = [torch.empty_like(share) for _ in range(world)]
        dist.all_gather(parts, share.contiguous())
        return torch.cat(parts)

    quantizer = train(rank, world, 2, gather, dist.all_reduce)
    save_file(quantizer.state_dict(), f"{folder}/rank{rank}.safetensors")
    dist.destroy_process_group()


def test_codebooks_equal_on_all_ranks_and_equal_to_one_process(tmp_path):
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
    zero, one = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    alone = train(0, 1, 1, lambda share: share, None).state_dict()
    for name, tensor in alone.items():
        assert torch.equal(zero[name], one[name]), name
        torch.testing.assert_close(zero[name], tensor, rtol=1e-4, atol=1e-5)
