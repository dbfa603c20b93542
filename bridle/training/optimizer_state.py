"""Master weights and Adam moments as whole float32 tensors by parameter name.

DeepSpeed partitions them differently in each ZeRO stage and for each number of ranks, and pickles them. Whole tensors
fit any stage and any number of ranks, and safetensors holds them. DeepSpeed's public `safe_get_full_*` gathers them;
for the way back its setters do not pad uneven ZeRO-3 partitions, so that the partitions are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostMemory:
    """Copies of tensors in the host's memory, kept from one checkpoint to the next: memory that was never touched costs
    more than the copy, and a GPU writes into pinned memory several times as fast."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """`value` as float32, overwriting what was copied under this name before; `wait` before it is read."""
        if name not in self._kept:
            self._kept[name] = torch.empty(value.shape, dtype=torch.float32, pin_memory=value.is_cuda)
        return self._kept[name].copy_(value.detach(), non_blocking=True)

    def wait(self) -> None:
        """Returns when all copies are there."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def gather_state(
    engine: Any, keep: bool, memory: HostMemory | None = None, with_moments: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments, on the CPU: ``({name: weight}, {"name|exp_avg": moment})``. All ranks must call it.

    keep: whether this rank wants the result; the others take part in gathering and get empty dicts. memory: where the
    copies go; new memory by default.
    """
    memory = memory or HostMemory()
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in _trained(engine.module):
        weight = _full(engine, parameter, None)
        if keep:
            weights[name] = memory.copy(name, weight)
        for key in MOMENTS if with_moments else ():
            moment = _full(engine, parameter, key)
            if keep:
                moments[f"{name}|{key}"] = memory.copy(f"{name}|{key}", moment)
    memory.wait()
    return weights, moments


def create_state(engine: Any) -> None:
    """Creates Adam's moments before the first step.

    torch would create them in the first step; but ZeRO 1 and 2 step group after group and link the moments of all
    groups to the parameters after the first, when those of the second are not there yet.
    """
    inner = _inner(engine)
    for flat in _flat_partitions(engine):
        count = torch.zeros((), device=flat.device)  # where a fused step reads it
        inner.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def restore_state(engine: Any, read: Callable[[str, torch.Size], Tensor], steps: int) -> None:
    """Puts gathered state back into a freshly built engine, of any ZeRO stage and any number of ranks.

    read: name (as `gather_state` gives them) and whole shape to a float32 tensor on the engine's device, the same on
    all ranks; asked once for each tensor, so that no rank holds more than one.
    """
    for state in _inner(engine).state.values():
        state["step"].fill_(float(steps))
    for name, parameter in _trained(engine.module):
        shape = whole_shape(parameter)
        _put(engine, parameter, read(name, shape), None)
        for key in MOMENTS:
            _put(engine, parameter, read(f"{name}|{key}", shape), key)


def state_shapes(engine: Any) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Whole shapes of the weights and of the moments that `gather_state` gives, by name."""
    weights = {name: whole_shape(parameter) for name, parameter in _trained(engine.module)}
    return weights, {f"{name}|{key}": shape for name, shape in weights.items() for key in MOMENTS}


def whole_shape(parameter: Any) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 keeps only a part of it here."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def set_step(engine: Any, parameters: Iterable[Tensor], steps: int) -> None:
    """Sets Adam's count of steps of some of the tensors it keeps state of."""
    state = _inner(engine).state
    for parameter in parameters:
        if parameter in state:
            state[parameter]["step"].fill_(float(steps))


def _inner(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer, which ZeRO's wraps."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _flat_partitions(engine: Any) -> list[Tensor]:
    """What torch's optimizer keeps state of: ZeRO's flat float32 partitions, or the parameters themselves."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    if partitions is not None:
        return list(partitions)
    return [flat for group in _inner(engine).param_groups for flat in group["params"]]


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _full(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    if _plain(parameter):
        return parameter if key is None else engine.optimizer.state[parameter][key]
    value = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    assert value is not None
    return value


def _put(engine: Any, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    value = value.to(parameter.device)
    if _plain(parameter):
        target = parameter.data if key is None else engine.optimizer.state[parameter][key]
        target.copy_(value)
    elif hasattr(parameter, "ds_id"):
        share = _own_share(parameter, value)
        if key is None:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _plain(parameter: nn.Parameter) -> bool:
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")


def _own_share(parameter: Any, value: Tensor) -> Tensor:
    """This rank's ZeRO-3 partition of a whole tensor, zero-padded as DeepSpeed pads it."""
    size = parameter.partition_numel()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    share = value.new_zeros(size)
    mine = value.flatten()[start : start + size]
    share[: mine.numel()] = mine
    return share
