"""What a GPU changes about numbers, shown on a CPU; and which device a rank takes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from launching import ROOT, environment, free_port
from test_no_waiting import job_of

from bridle.gpus import device_index
from bridle.settings import RecipeError
from bridle.training.engine import prepare_device, read_ds_config
from bridle.training.rendezvous import Place, refuse_shared_gpus

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("kind", ["encoder", "tokenizer"])
def test_casting_a_frozen_half_once_gives_what_autocast_gives_in_every_pass(kind):
    job = job_of(kind, "audio")
    as_before = copy.deepcopy(job)
    as_before.bf16 = job.bf16 = True
    frozen = job._frozen(job.tokenizer if kind == "encoder" else job.encoder)
    assert (
        frozen.state_dict()[next(name for name in frozen.state_dict() if "qkv.weight" in name)].dtype == torch.bfloat16
    )
    positions = torch.arange(48).expand(2, 48)
    batch = {"values": torch.randn(2, 1, 96, 128), "visible": positions[:, :24], "masked": positions[:, 24:]}
    for found, expected in zip(job.inputs(batch), as_before.inputs(batch), strict=True):
        assert found is expected is None or torch.equal(found, expected)


@pytest.fixture
def cuda_products() -> Iterator[Any]:
    found = torch.backends.cuda.matmul
    before, found.fp32_precision = found.fp32_precision, "ieee"
    yield found
    found.fp32_precision = before


def test_float32_on_a_gpu_is_said_with_the_file_to_take_and_tf32_is_allowed(cuda_products, caplog):
    prepare_device(CPU, read_ds_config("builtin:zero2"), "zero2.json", say=True)
    assert cuda_products.fp32_precision == "ieee"
    prepare_device(CUDA, read_ds_config("builtin:zero3_bf16"), "zero3_bf16.json", say=True)
    prepare_device(CUDA, read_ds_config("builtin:zero2"), "zero2.json", say=False)
    assert cuda_products.fp32_precision == "tf32"
    assert not caplog.records
    prepare_device(CUDA, read_ds_config("builtin:zero2"), "zero2.json", say=True)
    assert "zero2.json trains in float32" in caplog.text
    assert "--deepspeed_config builtin:zero2_bf16" in caplog.text


def test_a_rank_takes_its_own_device_or_the_only_one_it_sees():
    assert [device_index(local, 8) for local in (0, 5)] == [0, 5]
    assert device_index(5, 1) == 0
    with pytest.raises(RecipeError, match="LOCAL_RANK 5 has no device: this process sees 4"):
        device_index(5, 4)


def test_two_ranks_on_one_gpu_are_refused_by_name_before_nccl_fails():
    places = [Place(rank, "node-1", "net", "10.0.0.1", 1, "", gpu) for rank, gpu in enumerate(["", "", "A", "B"])]
    refuse_shared_gpus(places)
    with pytest.raises(RecipeError, match=r"ranks 2 and 4 on node-1 have the same GPU \(A\); start as many ranks"):
        refuse_shared_gpus([*places, Place(4, "node-1", "net", "10.0.0.1", 1, "", "A")])


STEPS = """
import torch
from bridle.config import TrainSettings
from bridle.training.engine import build_engine, read_ds_config, resolve_ds_config
from bridle.training.rendezvous import join, leave
join()
train = TrainSettings(batch_size=1, betas=(0.9, 0.95), weight_decay=0.1, gradient_clipping=1000.0)
torch.manual_seed(0)
layer = torch.nn.Linear(64, 64)
exact = layer.weight.detach().double().clone().requires_grad_()
bias = layer.bias.detach().double()
means, squares = torch.zeros_like(exact), torch.zeros_like(exact)
engine = build_engine(layer, resolve_ds_config(read_ds_config("builtin:zero2"), "zero2", train, 1), train, 1e-2)
for step in range(1, 21):
    rows = torch.randn(8, 64)
    loss = engine(rows).pow(2).sum()
    engine.backward(loss)
    engine.step()
    (gradient,) = torch.autograd.grad((rows.double() @ exact.T + bias).pow(2).sum(), exact)
    bias = layer.bias.detach().double()
    with torch.no_grad():
        means = 0.9 * means + 0.1 * gradient
        squares = 0.95 * squares + 0.05 * gradient**2
        change = (means / (1 - 0.9**step)) / ((squares / (1 - 0.95**step)).sqrt() + 1e-8)
        exact.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * change)
print(float((layer.weight.double() - exact).norm() / exact.norm()))
leave()
"""


def test_twenty_fused_steps_are_adamws_of_float64_to_rounding():
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=environment() | {"MASTER_PORT": str(free_port())}, cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert float(done.stdout.split()[-1]) < 1e-5


JOIN = """
import os
from bridle.training.rendezvous import join, leave
join(900.0)
print(os.environ["LOCAL_RANK"], os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])
leave()
"""


def test_slurms_local_id_is_taken_and_nccl_waits_longer_than_the_watchdog():
    given = environment() | {"SLURM_LOCALID": "3", "MASTER_PORT": str(free_port())}
    given = {name: value for name, value in given.items() if name != "LOCAL_RANK"}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], env=given, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    local, heartbeat = done.stdout.split()[-2:]
    assert local == "3"
    assert int(heartbeat) > 900 + 120  # the watchdog's time, and what the collectives wait beyond it
    assert "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC" not in os.environ
