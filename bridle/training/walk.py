"""Walks a run's phases from wherever its folder stands: what pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml

from bridle import __version__
from bridle.config import DataSource, RunSettings, TrainedPhase
from bridle.data.shards import ShardSet
from bridle.data.stream import Stream
from bridle.files import whole_file, write_json
from bridle.modalities import build_modality
from bridle.modeling.bridle import parameter_count
from bridle.seeds import SeedPart, phase_seed
from bridle.settings import RecipeError
from bridle.training.auto_clip import with_figures
from bridle.training.begun_with import NAME as DATA
from bridle.training.begun_with import BegunWith
from bridle.training.checkpoints import PhaseCheckpoints, Position, part_states
from bridle.training.clips import Delivery, raw_modality
from bridle.training.engine import build_engine, check_with_deepspeed, prepare_device, resolve_ds_config, uses_bf16
from bridle.training.keeper import Keeper
from bridle.training.lock import RunLock
from bridle.training.loop import Length, PhaseRun
from bridle.training.machine import peak_rate
from bridle.training.metrics import PrometheusMetrics, RunLog
from bridle.training.node_data import open_on_node
from bridle.training.phases import PhaseJob
from bridle.training.ranks import Ranks, is_lost_peer
from bridle.training.remote_run import RemoteRun
from bridle.training.run_folder import check_same_recipe
from bridle.training.shared_tensors import fill
from bridle.training.speed import Rate
from bridle.training.standing import Standing, find_standing
from bridle.training.status import ENDED, note_end
from bridle.training.stopping import StoppedError, StopRequest
from bridle.training.watchdog import Watchdog

log = logging.getLogger("bridle")
SettingsT = TypeVar("SettingsT", bound=RunSettings)


class PhaseWalk(Generic[SettingsT]):
    """One run folder and the recipe it was started with. Subclasses say what a phase trains, and what it leaves."""

    def __init__(
        self,
        recipe: SettingsT,
        ds_config: Mapping[str, Any],
        where: str,
        folder: Path,
        ranks: Ranks,
        stop: StopRequest,
        lock: RunLock,
        store: RemoteRun | None = None,
        allow_new_data: bool = False,
    ) -> None:
        """folder: the run's, or the working folder of one that is in a `store`.

        Raises RecipeError or ShardError on settings that cannot work, before anything is written.
        """
        if store is not None:
            ranks.on_first(store.fetch)
        self.recipe = recipe = with_figures(recipe, folder, ranks)
        self.stop = stop
        self.lock = lock
        self.watchdog = Watchdog(ranks, recipe.train.collective_timeout, folder / "stacks", ending=self._hung)
        self.folder = folder
        self.store = store
        self.where = store.store.url if store else str(folder)
        self.ranks = ranks
        self.modality = build_modality(recipe.modality, recipe.clip)
        self.ds_config = resolve_ds_config(ds_config, where, recipe.train, ranks.world)
        check_with_deepspeed(self.ds_config, where)
        self.bf16 = uses_bf16(self.ds_config)
        prepare_device(ranks.device, self.ds_config, where, say=ranks.first)
        self.deliver = self._delivery()
        self.peak = peak_rate(ranks.device, self.bf16)
        self.shards = self._open(recipe.data.mixture)
        self.heldout = self._open([DataSource(shards=recipe.data.heldout)]) if recipe.data.heldout else None
        moved = (folder / DATA).is_file()
        ranks.on_first(lambda: check_same_recipe(folder, recipe, other_names=moved, any_data=allow_new_data))
        self._begin()
        self.begun_with = BegunWith(folder, self.shards, self.heldout, ranks, allow_new=allow_new_data)

    def _delivery(self) -> Delivery:
        """How batches come from loaders to the device."""
        return Delivery(raw_modality(self.recipe), self.ranks.device)

    def _flops(self, index: int) -> float:
        """Operations of a clip's share of a step of phase `index`."""
        raise NotImplementedError

    def _begin(self) -> None:
        """What else must be settled before anything is written; all ranks call it."""

    def _run_phase(self, index: int, standing: Standing, run_log: RunLog | None, keeper: Keeper) -> None:
        """Trains phase `index` unless it is done, and leaves what it is for; all ranks call it."""
        raise NotImplementedError

    def _job(self, index: int, phase: Any, fresh: bool) -> PhaseJob:
        """A phase's components; fresh: whether no checkpoint fills them."""
        raise NotImplementedError

    def _stream(self, index: int, masked: bool, origin: int = 0) -> Stream:
        raise NotImplementedError

    def _heldout_stream(self, masked: bool) -> Stream | None:
        raise NotImplementedError

    def run(self) -> None:
        """Trains whatever is not yet trained, and leaves what the phases are for.

        Raises:
            StoppedError: asked to stop; whatever took long is saved, and the same command goes on from there.
        """
        standing, run_log = self._find_standing(), None
        self.begun_with.settle(standing, [phase.kind for phase in self.recipe.phases])
        self.ranks.on_first(self._describe)
        if self.ranks.first:
            run_log = RunLog(self.folder, self.recipe.train.prometheus_port)
            run_log.prometheus.alarms.labels("damaged_checkpoint").inc(standing.damaged)
            self.lock.beaten = run_log.prometheus.beaten
            self.lock.says = partial(self._says, run_log.prometheus)
        keeper = Keeper(self.ranks, run_log, self.store.push if self.store else None)
        self.watchdog.start()
        try:
            keeper.deliver()  # a store that cannot be written is found now, not at the first checkpoint
            for index, phase in enumerate(self.recipe.phases):
                self._stop_if_asked(f"[{index} {phase.kind}] the beginning")
                self._run_phase(index, standing, run_log, keeper)
                self.ranks.barrier()
            keeper.deliver()
        except StoppedError:
            self._note_end(f"stopped by {self.stop.reason or 'a signal to another rank'}")
            keeper.deliver()
            raise
        except Exception as error:
            self.watchdog.close()
            self._note_end("lost another rank" if is_lost_peer(error) else " ".join(str(error).split()), failed=True)
            raise
        finally:
            keeper.close()
            self.watchdog.close()

    def _says(self, metrics: PrometheusMetrics) -> dict[str, Any]:
        """What the run's lock says of it."""
        alarms = {kind: count for kind, count in metrics.alarm_counts().items() if count}
        return {"at": self.watchdog.place[:100], "waited": round(self.watchdog.waited, 1), "alarms": alarms}

    def _hung(self, said: str) -> None:
        self._note_end(said, failed=True)
        self.lock.release()

    def _note_end(self, said: str, failed: bool = False) -> None:
        if self.ranks.first:
            with contextlib.suppress(OSError):  # a full disk, say: it is why the run ended
                note_end(self.folder, said[:1000], failed)

    def _stop_if_asked(self, place: str = "the first batches") -> None:
        """All ranks must call it; for places where nothing is lost by stopping."""
        self.watchdog.at(place)
        if self.ranks.vote(self.stop.asked).passed():
            raise StoppedError

    def _find_standing(self) -> Standing:
        """From rank 0's disk, which alone holds the run."""
        kinds = [phase.kind for phase in self.recipe.phases]
        found = self.ranks.on_first(lambda: asdict(find_standing(self.folder, kinds)))
        return Standing(**found)

    def _open(self, sources: list[DataSource]) -> ShardSet:
        if not sources:
            raise RecipeError(
                "data.shards is empty: name tar shards with --data (paths, globs, s3://, https://, pipe:),"
                f" or --data builtin:{self.recipe.modality} for the sample that ships"
            )
        return open_on_node(sources, self.modality.extensions, self.recipe.data, self.ranks)

    def _checkpoints(self, index: int) -> PhaseCheckpoints:
        return PhaseCheckpoints(self.folder, index, self.recipe.phases[index].kind)

    def _seed(self, index: int, part: SeedPart) -> int:
        return phase_seed(self.recipe.seed, index, part)

    def _train(
        self,
        index: int,
        phase: TrainedPhase,
        step: int | None,
        run_log: RunLog | None,
        keeper: Keeper,
    ) -> None:
        """Trains one phase, from its checkpoint after `step` steps where there is one."""
        checkpoints = self._checkpoints(index)
        job = self._job(index, phase, fresh=step is None).prepare(self.recipe.train)
        position = Position()
        if step is not None:
            fill(job.module, checkpoints.step(step) / "model.safetensors", self.ranks)
        sizes = ", ".join(f"{name} {parameter_count(part) / 1e6:.2f} M" for name, part in job.parts.items())
        engine = build_engine(job.module, self.ds_config, self.recipe.train, phase.lr, job.slow_part, job.rate_of)
        if step is not None:
            position = checkpoints.restore(engine, step, self.ranks)
        if run_log is not None:
            run_log.forget_after(index, position.step, position.evaluation_due)
            log.info("[%d %s] %s; from step %d", index, job.kind, sizes, position.step)
        self._stop_if_asked(f"[{index} {job.kind}] the first step")
        stream = self._stream(index, job.masked, self.begun_with.first_position(index, position.samples))
        length = Length.of(phase, float(stream.order.samples_per_epoch), self.recipe.train.batch_size)
        position = PhaseRun(
            index=index,
            settings=phase,
            job=job,
            engine=engine,
            stream=stream,
            heldout=self._heldout_stream(job.masked),
            length=length,
            train=self.recipe.train,
            data=self.recipe.data,
            ranks=self.ranks,
            checkpoints=checkpoints,
            keeper=keeper,
            run_log=run_log,
            stop=self.stop,
            watchdog=self.watchdog,
            where=self.where,
            rate=Rate(self._flops(index), self.peak),
            deliver=self.deliver,
        ).run(position)
        self.watchdog.at(f"[{index} {job.kind}] writing the result")
        found = part_states(engine, job.parts, self.ranks)
        checkpoints.finish({name.rpartition(".")[2]: part for name, part in found.items()}, position, keeper)
        engine.destroy()

    def _describe(self) -> None:
        (self.folder / ENDED).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "recipe.yaml") as aside:
            aside.write_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        write_json(self.folder / "ds_config.json", self.ds_config)
        write_json(self.folder / "environment.json", environment(self.ranks))
        self.begun_with.write()


def environment(ranks: Ranks) -> dict[str, Any]:
    """Versions and devices, for whoever reads the run later."""
    packages = ("torch", "torchvision", "torchaudio", "deepspeed", "timm", "numpy")
    return {
        "bridle": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "ranks": ranks.world,
        "device": torch.cuda.get_device_name(ranks.device)
        if ranks.device.type == "cuda"
        else platform.processor() or "cpu",
        "packages": {name: metadata.version(name) for name in packages},
    }
