"""Checkpoints inside a phase, and what a finished phase leaves to the next ones.

``checkpoints/phase-1-encoder/step-00000100/``: ``model.safetensors`` (float32 master weights, and the buffers,
codebooks among them), ``optimizer.safetensors`` (Adam's moments), ``state.json``.
``checkpoints/phase-1-encoder/finished/``: one safetensors file per component and ``state.json``. Each folder appears
whole or not at all, with a ``manifest.json`` that has a hash of every file. Only rank 0 reads and writes them.
Nothing depends on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle.errors import MistakeError
from bridle.files import clear_disk_errors, read_json, whole_folder
from bridle.training.keeper import Keeper
from bridle.training.manifest import CheckpointError, check_folder, write_manifest
from bridle.training.optimizer_state import HostMemory, gather_state, restore_state, state_shapes
from bridle.training.ranks import Ranks
from bridle.training.shared_tensors import SharedTensors

FORMAT = 2


@dataclass
class Position:
    """How far a phase has come; written into each checkpoint.

    step: optimizer steps done; samples: clips consumed, the stream's position; corrupt: clips replaced so far; origin:
    of a result that was taken from another run, that run.
    evaluation_due: whether the held-out row of this step is still to come. window: where a stop fell between two rows
    of metrics, the sums of each rank and the counts of codes since the last one.
    """

    step: int = 0
    samples: int = 0
    corrupt: int = 0
    seconds: float = 0.0
    evaluation_due: bool = False
    window: dict[str, Any] | None = None
    origin: str = ""
    format: int = field(default=FORMAT)


class PhaseCheckpoints:
    """The checkpoints of one phase of a run."""

    def __init__(self, run: Path, index: int, kind: str, keep: int = 2) -> None:
        self.folder = run / "checkpoints" / f"phase-{index}-{kind}"
        self.name = f"[{index} {kind}]"
        self.keep = keep
        self.memory = HostMemory()

    @property
    def finished(self) -> Path:
        """Where the phase's result is, once it is done."""
        return self.folder / "finished"

    def step(self, number: int) -> Path:
        """Where the checkpoint after so many steps is."""
        return self.folder / f"step-{number:08d}"

    def is_finished(self) -> bool:
        """Whether the phase has left its result."""
        return (self.finished / "state.json").is_file()

    def steps(self) -> list[Path]:
        """Checkpoints inside the phase, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "state.json").is_file())

    def save(self, engine: Any, position: Position, keeper: Keeper) -> Path:
        """Copies the state to rank 0's memory and has it written behind training; all ranks must call it.

        Older checkpoints beyond `keep` go only after it stands, and stay if it cannot be written.
        """
        keeper.ranks.on_first(keeper.ready)  # one at a time, also in memory
        weights, moments = gather_state(engine, keeper.ranks.first, self.memory)
        buffers = cpu_buffers(engine.module) if keeper.ranks.first else {}
        target, state = self.step(position.step), asdict(position)

        def write() -> None:
            with whole_folder(target) as aside:
                save_file(weights | buffers, aside / "model.safetensors")
                save_file(moments, aside / "optimizer.safetensors")
                _write_state(aside, state)
            self._remove(self.steps()[: -self.keep])

        keeper.start(f"{self.name} checkpoint {target.name}", write)
        return target

    def _remove(self, steps: list[Path]) -> None:
        """Removes checkpoints, and what processes left that were killed while they wrote or removed one.

        They are hidden first: a kill half way leaves nothing that looks like a checkpoint and is torn.
        """
        for folder in steps:
            folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old"))
        for folder in [*self.folder.glob(".*.partial"), *self.folder.glob(".*.old")]:
            shutil.rmtree(folder)

    def restore(self, engine: Any, step: int, ranks: Ranks) -> Position:
        """Puts a checkpoint into a freshly built engine whose module was already filled; all ranks must call it.

        Raises:
            CheckpointError (OSError on the other ranks): it cannot be read, or does not fit.
        """
        folder = self.step(step)
        position = Position(**ranks.on_first(lambda: asdict(read_position(folder))))
        weight_shapes, moment_shapes = state_shapes(engine)
        weights = SharedTensors(folder / "model.safetensors", weight_shapes, ranks, exactly=False)
        moments = SharedTensors(folder / "optimizer.safetensors", moment_shapes, ranks)

        def read(name: str, shape: torch.Size) -> Tensor:
            return (moments if name in moment_shapes else weights).read(name, shape)

        restore_state(engine, read, position.step)
        return position

    def finish(self, parts: Mapping[str, Mapping[str, Tensor]], position: Position, keeper: Keeper) -> None:
        """Writes the phase's result, component by component, and waits for it; all ranks must call it.

        The newest checkpoint stays: if the result is ever found damaged, it is made again from there.

        Raises:
            OSError: full disk and the like, on all ranks; the checkpoints stand.
        """

        def write() -> None:
            with whole_folder(self.finished) as aside:
                for name, tensors in parts.items():
                    save_file(dict(tensors), aside / f"{name}.safetensors")
                _write_state(aside, asdict(position))
            self._remove(self.steps()[:-1])

        keeper.start(f"{self.name} result", write)
        keeper.settle()


def part_states(engine: Any, parts: Mapping[str, nn.Module], ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Whole float32 state dicts of components that stand inside an engine. All ranks must call it."""
    weights, _ = gather_state(engine, ranks.first, with_moments=False)
    everything = weights | cpu_buffers(engine.module)
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in everything.items() if key.startswith(f"{name}.")}
        for name in parts
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_position(folder: Path) -> Position:
    """Reads a checkpoint's `state.json`.

    Raises:
        CheckpointError: missing, another format version or missing fields.
    """
    try:
        raw = read_json(folder / "state.json")
    except OSError as error:
        raise CheckpointError(f"{folder / 'state.json'}: cannot be read ({error.strerror or error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise CheckpointError(
            f"{folder / 'state.json'}: format {found!r}, expected {FORMAT}; use the bridle that wrote it"
        )
    try:
        return Position(**raw)
    except TypeError as error:
        raise CheckpointError(f"{folder / 'state.json'}: {error}") from None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint or a result, by the file's name; none where every byte is the one written."""
    try:
        check_folder(folder)
        read_position(folder)
    except MistakeError as error:
        return str(error)
    return None


def cpu_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name, copied to the CPU."""
    parameters = {name for name, _ in module.named_parameters()}
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items() if k not in parameters}


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    with clear_disk_errors(folder):
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        write_manifest(folder)
