"""Checkpoints inside a phase, and what a finished phase leaves to the next ones.

``checkpoints/phase-1-encoder/step-00000100/``: ``model.safetensors`` (float32 master weights, and the buffers,
codebooks among them), ``optimizer.safetensors`` (Adam's moments), ``state.json``.
``checkpoints/phase-1-encoder/finished/``: one safetensors file per component and ``state.json``. Each folder appears
whole or not at all. Nothing depends on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle.files import clear_disk_errors, read_json, whole_folder
from bridle.training.optimizer_state import gather_state, restore_state
from bridle.training.ranks import Ranks

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged or of another version."""


@dataclass
class Position:
    """How far a phase has come; written into each checkpoint.

    step: optimizer steps done; samples: clips consumed, the stream's position; corrupt: clips replaced so far.
    evaluation_due: whether the held-out row of this step is still to come. window: where a stop fell between two rows
    of metrics, the sums of each rank and the counts of codes since the last one.
    """

    step: int = 0
    samples: int = 0
    corrupt: int = 0
    seconds: float = 0.0
    evaluation_due: bool = False
    window: dict[str, Any] | None = None
    format: int = field(default=FORMAT)


class PhaseCheckpoints:
    """The checkpoints of one phase of a run."""

    def __init__(self, run: Path, index: int, kind: str, keep: int = 2) -> None:
        self.folder = run / "checkpoints" / f"phase-{index}-{kind}"
        self.keep = keep

    @property
    def finished(self) -> Path:
        """Where the phase's result is, once it is done."""
        return self.folder / "finished"

    def is_finished(self) -> bool:
        """Whether the phase has left its result."""
        return (self.finished / "state.json").is_file()

    def steps(self) -> list[Path]:
        """Checkpoints inside the phase, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "state.json").is_file())

    def save(self, engine: Any, position: Position, ranks: Ranks) -> Path:
        """Writes a checkpoint; all ranks must call it. Older ones beyond `keep` go only after it stands.

        Raises:
            OSError: full disk and the like, on all ranks; older checkpoints are untouched.
        """
        weights, moments = gather_state(engine, keep=ranks.first)
        target = self.folder / f"step-{position.step:08d}"

        def write() -> None:
            with whole_folder(target) as aside:
                save_file(weights | cpu_buffers(engine.module), aside / "model.safetensors")
                save_file(moments, aside / "optimizer.safetensors")
                _write_state(aside, position)
            self._remove(self.steps()[: -self.keep])

        on_first_rank(write, ranks)
        return target

    def _remove(self, steps: list[Path]) -> None:
        """Removes checkpoints, and what processes left that were killed while they wrote one."""
        for folder in [*steps, *self.folder.glob(".*.partial"), *self.folder.glob(".*.old")]:
            shutil.rmtree(folder)

    def restore(self, engine: Any, folder: Path) -> Position:
        """Puts a checkpoint into a freshly built engine whose module was already filled by `load_weights`."""
        position = read_position(folder)
        parameters = {name for name, _ in engine.module.named_parameters()}
        weights = {
            name: value for name, value in read_tensors(folder / "model.safetensors").items() if name in parameters
        }
        restore_state(engine, weights, read_tensors(folder / "optimizer.safetensors"), position.step)
        return position

    def finish(self, parts: Mapping[str, Mapping[str, Tensor]], position: Position, ranks: Ranks) -> None:
        """Writes the phase's result, component by component, and removes the checkpoints on the way to it."""

        def write() -> None:
            with whole_folder(self.finished) as aside:
                for name, tensors in parts.items():
                    save_file(dict(tensors), aside / f"{name}.safetensors")
                _write_state(aside, position)
            self._remove(self.steps())

        on_first_rank(write, ranks)


def part_states(engine: Any, parts: Mapping[str, nn.Module], ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Whole float32 state dicts of components that stand inside an engine. All ranks must call it."""
    weights, _ = gather_state(engine, keep=ranks.first)
    everything = weights | cpu_buffers(engine.module)
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in everything.items() if key.startswith(f"{name}.")}
        for name in parts
    }


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Fills a module strictly.

    Raises:
        CheckpointError: missing, superfluous or misshapen weights.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: does not fit this recipe's model: {' '.join(str(error).split())}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors.

    Raises:
        CheckpointError: missing or damaged; says what to remove.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); remove {path.parent} to go on from the one before"
        ) from None


def read_position(folder: Path) -> Position:
    """Reads a checkpoint's `state.json`.

    Raises:
        CheckpointError: another format version or missing fields.
    """
    raw = read_json(folder / "state.json")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise CheckpointError(
            f"{folder / 'state.json'}: format {found!r}, expected {FORMAT}; use the bridle that wrote it"
        )
    try:
        return Position(**raw)
    except TypeError as error:
        raise CheckpointError(f"{folder / 'state.json'}: {error}") from None


def cpu_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name, copied to the CPU."""
    parameters = {name for name, _ in module.named_parameters()}
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items() if k not in parameters}


def on_first_rank(write: Any, ranks: Ranks) -> None:
    """Runs `write` on rank 0; if it fails, all ranks raise OSError, so that none waits for ever."""
    import torch

    failure: OSError | None = None
    if ranks.first:
        try:
            write()
        except OSError as error:
            failure = error
    failed = ranks.sum(torch.tensor([float(failure is not None)], device=ranks.device))
    if failure is not None:
        raise failure
    if failed.item():
        raise OSError("rank 0 could not write a checkpoint; its message says why")


def _write_state(folder: Path, position: Position) -> None:
    import json

    with clear_disk_errors(folder):
        (folder / "state.json").write_text(json.dumps(asdict(position), indent=2) + "\n", encoding="utf-8")
