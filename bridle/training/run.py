"""Walks a recipe's phases from wherever the run folder stands."""

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
from typing import Any

import torch
import yaml
from torch import Tensor

from bridle import __version__
from bridle.config import ColdStartPhase, DataSource, EncoderPhase, JointPhase, Recipe, TokenizerPhase
from bridle.data.shards import ShardSet, open_mixture
from bridle.data.stream import Stream
from bridle.files import whole_file, write_json
from bridle.modalities import build_modality
from bridle.model_folder import is_whole, patch_shape
from bridle.modeling.bridle import Components, parameter_count
from bridle.modeling.encoder import Encoder
from bridle.modeling.target import TargetScale
from bridle.modeling.tokenizer import Tokenizer
from bridle.settings import RecipeError
from bridle.training.auto_clip import with_figures
from bridle.training.begun_with import NAME as DATA
from bridle.training.begun_with import BegunWith
from bridle.training.checkpoints import (
    PhaseCheckpoints,
    Position,
    cpu_buffers,
    part_states,
    read_position,
)
from bridle.training.clips import Delivery, MakeClip, raw_modality
from bridle.training.engine import build_engine, resolve_ds_config, uses_bf16
from bridle.training.first_batches import fit_target, initialise_codebooks
from bridle.training.flops import ClipFlops
from bridle.training.joint import JointPhaseJob
from bridle.training.keeper import Keeper
from bridle.training.lock import RunLock
from bridle.training.loop import Length, PhaseRun
from bridle.training.machine import peak_rate
from bridle.training.metrics import PrometheusMetrics, RunLog
from bridle.training.origin import begin_from
from bridle.training.phases import EncoderModule, EncoderPhaseJob, PhaseJob, TokenizerModule, TokenizerPhaseJob
from bridle.training.ranks import Ranks, is_lost_peer
from bridle.training.remote_run import RemoteRun
from bridle.training.run_folder import check_same_recipe, export_model
from bridle.training.schedule import (
    MAKES_ENCODER,
    check_joint,
    cold_start_of,
    encoder_before,
    iteration_of,
    last_model,
    tokenizer_before,
    tokenizer_phase_of,
)
from bridle.training.shared_tensors import fill
from bridle.training.speed import Rate
from bridle.training.standing import Standing, find_standing
from bridle.training.status import ENDED, note_end
from bridle.training.stopping import StoppedError, StopRequest
from bridle.training.watchdog import Watchdog

log = logging.getLogger("bridle")


class PretrainingRun:
    """One run folder and the recipe it was started with."""

    def __init__(
        self,
        recipe: Recipe,
        ds_config: Mapping[str, Any],
        where: str,
        folder: Path,
        ranks: Ranks,
        stop: StopRequest,
        lock: RunLock,
        store: RemoteRun | None = None,
        allow_new_data: bool = False,
        origin: str | None = None,
    ) -> None:
        """folder: the run's, or the working folder of one that is in a `store`; origin: of `--from`.

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
        self.bf16 = uses_bf16(self.ds_config)
        self.deliver = Delivery(raw_modality(recipe), ranks.device)
        patch = patch_shape(self.modality)
        self.components = Components(recipe.model, patch)
        self.flops = ClipFlops(recipe, patch, tuple(self.modality.grid.values()))
        self.peak = peak_rate(ranks.device, self.bf16)
        self.shards = self._open(recipe.data.mixture)
        self.heldout = self._open([DataSource(shards=recipe.data.heldout)]) if recipe.data.heldout else None
        check_joint(recipe, self.ds_config)
        moved = (folder / DATA).is_file()
        ranks.on_first(lambda: check_same_recipe(folder, recipe, other_names=moved, any_data=allow_new_data))
        if origin is not None:
            ranks.on_first(lambda: begin_from(origin, folder, recipe))
        self.begun_with = BegunWith(folder, self.shards, self.heldout, ranks, allow_new=allow_new_data)

    def run(self) -> None:
        """Trains whatever is not yet trained and leaves `models/final`.

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
                if isinstance(phase, ColdStartPhase) and (index >= standing.phase or index in standing.again):
                    self._cold_start(index, keeper)
                elif not isinstance(phase, ColdStartPhase) and index >= standing.phase:
                    step = standing.step if index == standing.phase else None
                    self._train(index, phase, step, run_log, keeper)
                if isinstance(phase, MAKES_ENCODER):
                    self.ranks.on_first(partial(self._export, index, anew=index >= standing.phase))
                    keeper.push()
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
        data = self.recipe.data
        if not sources:
            raise RecipeError(
                "data.shards is empty: name tar shards with --data (paths, globs, s3://, https://, pipe:),"
                f" or --data builtin:{self.recipe.modality} for the sample that ships"
            )
        return open_mixture(
            [(source.shards, source.weight) for source in sources],
            extensions=self.modality.extensions,
            cache=data.cache,
            cache_gb=data.cache_gb,
        )

    def _checkpoints(self, index: int) -> PhaseCheckpoints:
        return PhaseCheckpoints(self.folder, index, self.recipe.phases[index].kind)

    def _seed(self, index: int, part: int) -> int:
        """A seed of its own for each component of each phase."""
        return (self.recipe.seed * 1_000 + index) * 10 + part

    def _stream(self, index: int, masked: bool, origin: int = 0) -> Stream:
        data = self.recipe.data
        make = MakeClip(self.deliver.modality, self.recipe.mask if masked else None, augment=True)
        seed, block, window = self._seed(index, 0), data.shuffle_block, data.shuffle_window
        return Stream(self.shards, make, seed=seed, block=block, window=window, origin=origin)

    def _heldout_stream(self, masked: bool) -> Stream | None:
        if self.heldout is None:
            return None
        make = MakeClip(self.deliver.modality, self.recipe.mask if masked else None, augment=False)
        return Stream(self.heldout, make, seed=self.recipe.seed, block=1, window=1, shuffle=False)

    def _cold_start(self, index: int, keeper: Keeper) -> None:
        tokenizer = self.components.cold_start_tokenizer(self._seed(index, 1))
        self._initialise(tokenizer, index)
        state = {"tokenizer": cpu_state(tokenizer)}
        self._checkpoints(index).finish(state, Position(samples=self.recipe.train.batch_size), keeper)
        if self.ranks.first:
            log.info("[%d cold_start] random projection, codebooks from the first batch", index)

    def _initialise(self, tokenizer: Tokenizer, index: int) -> None:
        stream = self._stream(index, masked=False)
        seed = self._seed(index, 2)
        initialise_codebooks(
            tokenizer, stream, self.recipe, self.ranks, seed, self._stop_if_asked, self.modality.deviation
        )

    def _train(
        self,
        index: int,
        phase: EncoderPhase | TokenizerPhase | JointPhase,
        step: int | None,
        run_log: RunLog | None,
        keeper: Keeper,
    ) -> None:
        """Trains one phase, from its checkpoint after `step` steps where there is one."""
        checkpoints = self._checkpoints(index)
        job = self._job(index, phase, fresh=step is None)
        position = Position()
        if step is not None:
            fill(job.module, checkpoints.step(step) / "model.safetensors", self.ranks)
        sizes = ", ".join(f"{name} {parameter_count(part) / 1e6:.2f} M" for name, part in job.parts.items())
        engine = build_engine(job.module, self.ds_config, self.recipe.train, phase.lr, job.slow_part)
        if step is not None:
            position = checkpoints.restore(engine, step, self.ranks)
        if run_log is not None:
            run_log.forget_after(index, position.step)
            log.info("[%d %s] %s; from step %d", index, job.kind, sizes, position.step)
        self._stop_if_asked(f"[{index} {job.kind}] the first step")
        stream = self._stream(index, job.masked, self.begun_with.first_position(index, position.samples))
        length = Length.of(phase, float(stream.order.samples_per_epoch), self.recipe.train.batch_size)
        position = PhaseRun(
            index, phase, job, engine, stream, self._heldout_stream(job.masked), length,
            self.recipe.train, self.recipe.data, self.ranks, checkpoints, keeper, run_log, self.stop, self.watchdog,
            self.where, Rate(self.flops.of_phase(index), self.peak), self.deliver,
        ).run(position)  # fmt: skip
        self.watchdog.at(f"[{index} {job.kind}] writing the result")
        found = part_states(engine, job.parts, self.ranks)
        checkpoints.finish({name.rpartition(".")[2]: part for name, part in found.items()}, position, keeper)
        engine.destroy()

    def _job(self, index: int, phase: EncoderPhase | TokenizerPhase | JointPhase, fresh: bool) -> PhaseJob:
        """Builds a phase's components: the trained half afresh or from the phase before, the frozen half read."""
        make, quantizer = self.components, self.recipe.model.quantizer
        before = encoder_before(self.recipe, index)
        if isinstance(phase, JointPhase):
            return self._joint_job(index, phase, fresh)
        if isinstance(phase, EncoderPhase):
            encoder = make.encoder(self._seed(index, 3))
            if before is not None and phase.init == "continue":
                self._fill(encoder, before, "encoder")
            return EncoderPhaseJob(
                encoder, make.decoder(self._seed(index, 4)), self._tokenizer_for(index), quantizer,
                self.ranks.device, self.bf16, phase.soft_codes,
            )  # fmt: skip
        assert before is not None
        teacher, learner = make.encoder(0), make.tokenizer(self._seed(index, 5))
        self._fill(teacher, before, "encoder")
        if phase.init == "teacher":
            learner.encoder.load_state_dict(teacher.state_dict())
        target = TargetScale(teacher.width) if phase.target == "standardized" else None
        if fresh:
            self._initialise(learner, index)
            self._fit_target(target, teacher, index)
        return TokenizerPhaseJob(
            learner, make.estimator(self._seed(index, 6)), teacher, quantizer, self.ranks.device, self.bf16,
            target, self._tokenizer_of(cold_start_of(self.recipe)),
        )  # fmt: skip

    def _joint_job(self, index: int, phase: JointPhase, fresh: bool) -> JointPhaseJob:
        make, quantizer = self.components, self.recipe.model.quantizer
        encoder, tokenizer = make.encoder(self._seed(index, 3)), make.tokenizer(self._seed(index, 5))
        target = TargetScale(encoder.width, follows=True) if phase.target == "standardized" else None
        before, learned = encoder_before(self.recipe, index), tokenizer_before(self.recipe, index)
        warm = phase.init == "continue"
        if warm and before is not None:
            self._fill(encoder, before, "encoder")
        if warm and learned is not None:
            self._fill(tokenizer, learned, "tokenizer")
        elif fresh:
            self._initialise(tokenizer, index)
        if fresh:
            self._fit_target(target, encoder, index)
        estimator = make.estimator(self._seed(index, 6))
        return JointPhaseJob(
            EncoderModule(encoder, make.decoder(self._seed(index, 4))),
            TokenizerModule(tokenizer, estimator, quantizer.cosine_weight, target),
            phase, quantizer, self.ranks.device, self.bf16, self._tokenizer_of(cold_start_of(self.recipe)),
        )  # fmt: skip

    def _fit_target(self, target: TargetScale | None, teacher: Encoder, index: int) -> None:
        if target is not None:
            stream = self._stream(index, masked=False)
            fit_target(target, teacher, stream, self.recipe, self.ranks, self.bf16, self._stop_if_asked)

    def _tokenizer_for(self, index: int) -> Tokenizer:
        """The tokenizer whose codes encoder phase `index` predicts."""
        return self._tokenizer_of(tokenizer_phase_of(self.recipe, index))

    def _tokenizer_of(self, source: int) -> Tokenizer:
        cold = isinstance(self.recipe.phases[source], ColdStartPhase)
        tokenizer = self.components.cold_start_tokenizer(0) if cold else self.components.tokenizer(0)
        self._fill(tokenizer, source, "tokenizer")
        return tokenizer

    def _fill(self, module: Encoder | Tokenizer, index: int, part: str) -> None:
        fill(module, self._checkpoints(index).finished / f"{part}.safetensors", self.ranks)

    def _export(self, index: int, anew: bool) -> None:
        """Writes the models that a finished phase stands for; unless `anew`, those that are not there: a run may be
        killed in between."""
        targets = [f"iteration-{iteration_of(self.recipe, index)}"]
        if index == last_model(self.recipe):
            targets.append("final")
        trained_here = not read_position(self._checkpoints(index).finished).origin
        for target in (self.folder / "models" / name for name in targets):
            if trained_here and (anew or not is_whole(target)):
                export_model(self.folder, index, target)
                log.info("model written to %s", target)

    def _describe(self) -> None:
        (self.folder / ENDED).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "recipe.yaml") as aside:
            aside.write_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        write_json(self.folder / "ds_config.json", self.ds_config)
        write_json(self.folder / "environment.json", environment(self.ranks))
        self.begun_with.write()


def cpu_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's whole state, copied to the CPU."""
    return {key: value.detach().cpu().clone() for key, value in module.named_parameters()} | cpu_buffers(module)


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
