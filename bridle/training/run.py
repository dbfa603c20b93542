"""Pretraining: walks a recipe's phases, and leaves a model wherever an encoder is done."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bridle.config import ColdStartPhase, EncoderPhase, JointPhase, Recipe, TokenizerPhase
from bridle.data.stream import Stream
from bridle.model_folder import is_whole, patch_shape
from bridle.modeling.bridle import Components
from bridle.modeling.encoder import Encoder
from bridle.modeling.target import TargetScale
from bridle.modeling.tokenizer import Tokenizer
from bridle.seeds import SeedPart
from bridle.training.checkpoints import Position, cpu_buffers, read_position
from bridle.training.clips import MakeClip
from bridle.training.first_batches import fit_target, initialise_codebooks
from bridle.training.fits import check_recipe
from bridle.training.flops import ClipFlops
from bridle.training.joint import JointPhaseJob
from bridle.training.keeper import Keeper
from bridle.training.metrics import RunLog
from bridle.training.origin import begin_from
from bridle.training.phases import EncoderModule, EncoderPhaseJob, PhaseJob, TokenizerModule, TokenizerPhaseJob
from bridle.training.run_folder import export_model
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
from bridle.training.standing import Standing
from bridle.training.walk import PhaseWalk

log = logging.getLogger("bridle")


class PretrainingRun(PhaseWalk[Recipe]):
    """A run of a recipe's encoder and tokenizer phases."""

    def __init__(self, *args: Any, origin: str | None = None, **options: Any) -> None:
        """As `PhaseWalk`; origin: of `--from`."""
        self.origin = origin
        super().__init__(*args, **options)

    def _begin(self) -> None:
        patch, grid = patch_shape(self.modality), tuple(self.modality.grid.values())
        check_recipe(self.recipe, grid)
        self.components = Components(self.recipe.model, patch)
        self.flops = ClipFlops(self.recipe, patch, grid)
        check_joint(self.recipe, self.ds_config)
        origin = self.origin
        if origin is not None:
            self.ranks.on_first(lambda: begin_from(origin, self.folder, self.recipe))

    def _flops(self, index: int) -> float:
        return self.flops.of_phase(index)

    def _run_phase(self, index: int, standing: Standing, run_log: RunLog | None, keeper: Keeper) -> None:
        """Trains a phase; where it ends with an encoder, leaves its model, and `models/final` after the last one."""
        phase = self.recipe.phases[index]
        if isinstance(phase, ColdStartPhase) and (index >= standing.phase or index in standing.again):
            self._cold_start(index, keeper)
        elif not isinstance(phase, ColdStartPhase) and index >= standing.phase:
            step = standing.step if index == standing.phase else None
            self._train(index, phase, step, run_log, keeper)
        if isinstance(phase, MAKES_ENCODER):
            self.ranks.on_first(partial(self._export, index, anew=index >= standing.phase))
            keeper.push()

    def _stream(self, index: int, masked: bool, origin: int = 0) -> Stream:
        data = self.recipe.data
        make = MakeClip(self.deliver.modality, self.recipe.mask if masked else None, augment=True)
        seed, block, window = self._seed(index, SeedPart.ORDER), data.shuffle_block, data.shuffle_window
        return Stream(self.shards, make, seed=seed, block=block, window=window, origin=origin)

    def _heldout_stream(self, masked: bool) -> Stream | None:
        if self.heldout is None:
            return None
        make = MakeClip(self.deliver.modality, self.recipe.mask if masked else None, augment=False)
        return Stream(self.heldout, make, seed=self.recipe.seed, block=1, window=1, shuffle=False)

    def _cold_start(self, index: int, keeper: Keeper) -> None:
        tokenizer = self.components.cold_start_tokenizer(self._seed(index, SeedPart.COLD_START))
        self._initialise(tokenizer, index)
        state = {"tokenizer": cpu_state(tokenizer)}
        self._checkpoints(index).finish(state, Position(samples=self.recipe.train.batch_size), keeper)
        if self.ranks.first:
            log.info("[%d cold_start] random projection, codebooks from the first batch", index)

    def _initialise(self, tokenizer: Tokenizer, index: int) -> None:
        stream = self._stream(index, masked=False)
        seed = self._seed(index, SeedPart.CODEBOOKS)
        initialise_codebooks(
            tokenizer, stream, self.recipe, self.ranks, seed, self._stop_if_asked, self.modality.deviation
        )

    def _job(self, index: int, phase: EncoderPhase | TokenizerPhase | JointPhase, fresh: bool) -> PhaseJob:
        """Builds a phase's components: the trained half afresh or from the phase before, the frozen half read."""
        make, quantizer = self.components, self.recipe.model.quantizer
        before = encoder_before(self.recipe, index)
        if isinstance(phase, JointPhase):
            return self._joint_job(index, phase, fresh)
        if isinstance(phase, EncoderPhase):
            encoder = make.encoder(self._seed(index, SeedPart.ENCODER))
            if before is not None and phase.init == "continue":
                self._fill(encoder, before, "encoder")
            return EncoderPhaseJob(
                encoder=encoder,
                decoder=make.decoder(self._seed(index, SeedPart.DECODER)),
                tokenizer=self._tokenizer_for(index),
                quantizer=quantizer,
                device=self.ranks.device,
                bf16=self.bf16,
                soft_codes=phase.soft_codes,
            )
        assert before is not None
        teacher, learner = make.encoder(0), make.tokenizer(self._seed(index, SeedPart.TOKENIZER))
        self._fill(teacher, before, "encoder")
        if phase.init == "teacher":
            learner.encoder.load_state_dict(teacher.state_dict())
        target = TargetScale(teacher.width) if phase.target == "standardized" else None
        if fresh:
            self._initialise(learner, index)
            self._fit_target(target, teacher, index)
        return TokenizerPhaseJob(
            tokenizer=learner,
            estimator=make.estimator(self._seed(index, SeedPart.ESTIMATOR)),
            encoder=teacher,
            quantizer=quantizer,
            device=self.ranks.device,
            bf16=self.bf16,
            target=target,
            control=self._tokenizer_of(cold_start_of(self.recipe)),
        )

    def _joint_job(self, index: int, phase: JointPhase, fresh: bool) -> JointPhaseJob:
        make, quantizer = self.components, self.recipe.model.quantizer
        encoder = make.encoder(self._seed(index, SeedPart.ENCODER))
        tokenizer = make.tokenizer(self._seed(index, SeedPart.TOKENIZER))
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
        estimator = make.estimator(self._seed(index, SeedPart.ESTIMATOR))
        return JointPhaseJob(
            students=EncoderModule(encoder, make.decoder(self._seed(index, SeedPart.DECODER))),
            tokenizers=TokenizerModule(tokenizer, estimator, quantizer.cosine_weight, target),
            settings=phase,
            quantizer=quantizer,
            device=self.ranks.device,
            bf16=self.bf16,
            control=self._tokenizer_of(cold_start_of(self.recipe)),
        )

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


def cpu_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's whole state, copied to the CPU."""
    return {key: value.detach().cpu().clone() for key, value in module.named_parameters()} | cpu_buffers(module)
