"""The step to compare with: transformers' ViTMAEForPreTraining, what a user would run instead."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridle.config import Recipe
from bridle.modeling.patches import PatchShape


class ViTMAEStep:
    """A training step of ViTMAE at a recipe's width, depth, heads, mask ratio and batch, with AdamW, clips at hand.

    It takes square pictures only, so it gets the nearest square number of patches, of as many values as the recipe's.
    Its decoder has the recipe's width, depth and heads, with full attention. Nothing is loaded or copied, and no
    gradients are exchanged or clipped.
    """

    def __init__(
        self, recipe: Recipe, patch: PatchShape, grid: tuple[int, ...], batch: int, bf16: bool, device: torch.device
    ) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        encoder, decoder = recipe.model.encoder, recipe.model.decoder
        side, step = round(math.sqrt(math.prod(grid))), patch.size[-1]
        channels = patch.numel // step**2
        self.patches = side**2
        config = ViTMAEConfig(
            hidden_size=encoder.width, num_hidden_layers=encoder.depth, num_attention_heads=encoder.heads,
            intermediate_size=4 * encoder.width, image_size=side * step, patch_size=step, num_channels=channels,
            decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads, decoder_intermediate_size=4 * decoder.width,
            mask_ratio=recipe.mask.ratio,
        )  # fmt: skip
        shape = (batch, channels, side * step, side * step)
        self.flops = _flops(lambda: ViTMAEForPreTraining(config), shape)
        self.device, self.bf16 = device, bf16
        self.model: torch.nn.Module = ViTMAEForPreTraining(config).train()
        self.model.to(device)
        self.clips = torch.randn(shape, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        """One step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.clips).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def is_installed() -> bool:
    """Whether transformers is there; it comes with the extra hf."""
    return importlib.util.find_spec("transformers") is not None


def _flops(build: Callable[[], torch.nn.Module], shape: tuple[int, ...]) -> int:
    """Operations of a step, attention included, counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model, clips = build(), torch.empty(shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(clips).loss.backward()
    return int(counter.get_total_flops())
