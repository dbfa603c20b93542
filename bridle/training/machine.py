"""What a device can do: the rate of its matrix products, as its maker states it or as measured here."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

STATED = {
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 495e12, 67e12),
    "H200": (989e12, 495e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "L4": (121e12, 60e12, 30.3e12),
}
"""FLOP/s of dense products in bfloat16, TF32 and float32, by the makers' data sheets; the first name that fits
counts."""
LEAST_SECONDS = 0.03
"""A product is repeated for about so long."""


def stated_rate(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s by the data sheet, at the precision that products have here; none where there is no such sheet."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((rates for known, rates in STATED.items() if known in name), None)
    if found is None:
        return None
    plain = 1 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 2
    return found[0 if bf16 else plain]


def peak_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s that MFU counts against: stated, else that of a square product, measured now."""
    stated = stated_rate(device, bf16)
    if stated is not None:
        return stated
    side = 4096 if device.type == "cuda" else 512
    square = torch.randn(side, side, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    product = Product(lambda: torch.mm(square, square), device)
    return max(product.rate() for _ in range(3))


class Product:
    """A piece of work and how often it is done each time it is measured."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.run, self.device = run, device
        with FlopCounterMode(display=False) as counter:
            run()
        self.flops = counter.get_total_flops()
        self.times = max(1, round(LEAST_SECONDS / max(seconds(run, device), 1e-6)))

    def rate(self) -> float:
        """FLOP/s of one measurement."""
        return self.flops * self.times / seconds(self.run, self.device, self.times)


def seconds(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Wall time of `times` runs, with what they leave to the device."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
