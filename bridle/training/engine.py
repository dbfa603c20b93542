"""The DeepSpeed engine of a phase: its configuration, optimizer and learning rate."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridle.config import TrainSettings
from bridle.settings import RecipeError
from bridle.training.optimizer_state import create_state, set_step

log = logging.getLogger("bridle")
RESTS, BETAS, RATE = "rests", "own_betas", "share_of_the_rate"
"""Keys of a parameter group: whether it rests in some steps, its betas in those in which it does not, and the share of
the learning rate that it gets."""
FULL_MEMORY = 1.0 - 1e-12
"""A beta that leaves float32 moments as they are, and is not 1, by which Adam would divide zero by zero."""
SECTIONS_OF_THE_RECIPE = {
    "optimizer": "the recipe's train.betas, train.weight_decay and phases",
    "scheduler": "the recipe's phases",
}


READ_HERE = {
    "zero_optimization": ("stage", int, "0, 1, 2 or 3"),
    "bf16": ("enabled", bool, "true or false"),
    "fp16": ("enabled", bool, "true or false"),
    "torch_autocast": ("enabled", bool, "true or false"),
}
"""Sections by which more than DeepSpeed goes: the field, its type, and what to write. DeepSpeed takes "3" for 3 and
leaves out what is "auto"; whoever else reads them must read the same."""
SHIPPED = Path(__file__).resolve().parent.parent / "ds_configs"
"""In a checkout a link to ``ds_configs/`` beside the package; in a wheel a folder."""


def read_ds_config(path: str) -> dict[str, Any]:
    """Reads a DeepSpeed configuration: a file, or ``builtin:NAME`` for one that ships with the package.

    Raises:
        RecipeError: no such file or name, not a JSON object.
    """
    file = Path(path)
    if path.startswith("builtin:"):
        names = sorted(found.stem for found in SHIPPED.glob("*.json"))
        name = path.removeprefix("builtin:")
        if name not in names:
            raise RecipeError(f"--deepspeed_config {path}: found '{name}', expected one of {', '.join(names)}")
        file = SHIPPED / f"{name}.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"--deepspeed_config {path}: {error.strerror or error}; try builtin:zero2") from None
    except ValueError as error:
        raise RecipeError(f"--deepspeed_config {path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"--deepspeed_config {path}: found {type(raw).__name__}, expected a JSON object")
    return raw


def resolve_ds_config(given: Mapping[str, Any], where: str, train: TrainSettings, world: int) -> dict[str, Any]:
    """Fills in what the recipe decides.

    Raises:
        RecipeError: a field that both name, with different values; a section that belongs to the recipe, or is none;
            float16; a batch that does not divide over the ranks.
    """
    _check_sections(given, where)
    micro, accumulation = split_batch(train, world)
    ours = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.batch_size and train.micro_batch_size"),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping"),
    }
    for section, owner in SECTIONS_OF_THE_RECIPE.items():
        if section in given:
            raise RecipeError(f"{where}: '{section}' conflicts with {owner}, which decide it; remove it from {where}")
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if train.compile and stage == 3:
        raise RecipeError(
            f"{where}: ZeRO stage 3 gathers weights inside each block, which train.compile cannot compile; take a lower"
            " stage, or train.compile=false"
        )
    if given.get("fp16", {}).get("enabled"):
        raise RecipeError(f"{where}: fp16.enabled is not supported (residual codes need range); use bf16.enabled")
    if given.get("bf16", {}).get("enabled") and stage == 0:
        raise RecipeError(
            f"{where}: bf16.enabled with ZeRO stage 0 keeps weights where no checkpoint can reach them;"
            " set zero_optimization.stage to 1 (which needs less memory), or use torch_autocast instead of bf16"
        )
    for field, (value, owner) in ours.items():
        if given.get(field, "auto") not in ("auto", value):
            raise RecipeError(
                f"{where}: {field} = {given[field]} conflicts with the recipe's {owner}, which makes it"
                f" {value}; remove it from {where} or change the recipe"
            )
    return {
        **given,
        **{field: value for field, (value, _) in ours.items()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": given.get("steps_per_print", 2**31),
        # DeepSpeed's own timer waits for the device twice in every micro-step.
        "timers": given.get("timers", {"throughput": {"enabled": False}}),
    }


def _check_sections(given: Mapping[str, Any], where: str) -> None:
    if "bfloat16" in given:
        raise RecipeError(f"{where}: bfloat16 is an old name; write that section as bf16")
    for section, (field, kind, expected) in READ_HERE.items():
        found = given.get(section, {})
        if not isinstance(found, Mapping):
            raise RecipeError(f"{where}: {section} = {json.dumps(found)}: expected an object, such as its {field}")
        if field in found and type(found[field]) is not kind:
            raise RecipeError(f"{where}: {section}.{field} = {json.dumps(found[field])}: expected {expected}")


def check_with_deepspeed(ds_config: Mapping[str, Any], where: str) -> None:
    """Has DeepSpeed read a resolved configuration, before anything is trained.

    Raises:
        RecipeError: it does not take it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(dict(ds_config)))
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise RecipeError(f"{where}: DeepSpeed does not take it: {' '.join(str(error).split())[:300]}") from None


def prepare_device(device: torch.device, ds_config: Mapping[str, Any], where: str, say: bool) -> None:
    """On a GPU: float32 products may use its TF32 units, but the quantizer's (`full_float32`). With `say`, a warning
    that float32 wastes it, and which file to name instead.

    The file is not replaced: what was named is what runs, and a run goes on in the precision that it began in.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if say and not uses_bf16(ds_config):
        stage = max(1, ds_config.get("zero_optimization", {}).get("stage", 0))
        log.warning(
            "%s trains in float32, and a GPU is several times as fast in bfloat16: for a new run take"
            " --deepspeed_config builtin:zero%d_bf16", where, stage,
        )  # fmt: skip


def split_batch(train: TrainSettings, world: int) -> tuple[int, int]:
    """Clips per rank and forward pass, and forward passes per optimizer step.

    Raises:
        RecipeError: the batch does not divide.
    """
    if train.batch_size % world:
        raise RecipeError(
            f"train.batch_size {train.batch_size} does not divide over {world} ranks; choose a multiple of {world}"
        )
    per_rank = train.batch_size // world
    micro = min(train.micro_batch_size or per_rank, per_rank)
    if per_rank % micro:
        raise RecipeError(
            f"train.micro_batch_size {micro} does not divide the {per_rank} clips that each of {world} ranks has per"
            f" step; choose a divisor of {per_rank}"
        )
    return micro, per_rank // micro


@dataclass(frozen=True)
class SlowStep:
    """rests: whether the slow child rests in the step at hand; steps: those that it has taken before."""

    rests: bool
    steps: int


def uses_bf16(ds_config: Mapping[str, Any]) -> bool:
    """Whether the transformer runs in bfloat16 (the quantizer never does)."""
    return bool(ds_config.get("bf16", {}).get("enabled") or ds_config.get("torch_autocast", {}).get("enabled"))


def build_engine(
    module: nn.Module,
    ds_config: Mapping[str, Any],
    train: TrainSettings,
    lr: float,
    slow: str | None = None,
    rate_of: Callable[[str], float] | None = None,
) -> Any:
    """Wraps a phase's module; its optimizer is torch's AdamW in one fused kernel, which compiles nothing.

    slow: name of the child whose weights rest in some steps (see `SlowStep`); rate_of: from a parameter's name to the
    share of the learning rate that it gets; none: all of it.
    """
    import deepspeed

    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed, rests = (
                parameter.ndim == 2 and "bias" not in name,
                slow is not None and name.startswith(f"{slow}."),
            )
            groups.setdefault((rests, not decayed, rate_of(name) if rate_of else 1.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": groups[rests, plain, rate],
                "weight_decay": 0.0 if plain else train.weight_decay,
                RESTS: rests,
                RATE: rate,
            }
            for rests, plain, rate in sorted(groups)
        ],
        lr=lr,
        betas=train.betas,
        fused=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # ZeRO stage 1 in bfloat16 prints what memory it takes
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
    create_state(engine)
    return engine


def learning_rate(peak: float, step: int, warmup: int, total: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then cosine to 0 at `total`; `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_learning_rate(engine: Any, lr: float, slow: SlowStep | None = None) -> None:
    """Sets it for all parameter groups, each its share.

    slow: of the child that `build_engine` was told rests in some steps. A step at rest changes neither its weights nor
    their moments, and the bias correction counts its own steps.
    """
    for group in engine.optimizer.param_groups:
        at_rest = slow is not None and slow.rests and group[RESTS]
        own = group.setdefault(BETAS, group["betas"])
        group["lr"] = 0.0 if at_rest else lr * group[RATE]
        group["betas"] = (FULL_MEMORY, FULL_MEMORY) if at_rest else own
        if slow is not None and group[RESTS]:
            set_step(engine, group["params"], slow.steps)
