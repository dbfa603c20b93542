"""A recipe's phases ready to step, with random weights in place of what the phases before would have left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from bridle.config import ColdStartPhase, DataSource, EncoderPhase, JointPhase, Recipe, TrainedPhase, TrainSettings
from bridle.data.shards import open_mixture
from bridle.data.stream import Stream
from bridle.modalities import build_modality
from bridle.model_folder import patch_shape
from bridle.modeling.bridle import Components
from bridle.modeling.target import TargetScale
from bridle.modeling.tokenizer import LearnedTokenizer, Tokenizer
from bridle.training.auto_clip import AUTO
from bridle.training.checkpoints import PhaseCheckpoints
from bridle.training.clips import Delivery, MakeClip, raw_modality
from bridle.training.engine import build_engine, check_with_deepspeed, resolve_ds_config, uses_bf16
from bridle.training.fits import check_recipe
from bridle.training.flops import ClipFlops
from bridle.training.joint import JointPhaseJob
from bridle.training.keeper import Keeper
from bridle.training.loop import Length, PhaseRun
from bridle.training.phases import EncoderModule, EncoderPhaseJob, PhaseJob, TokenizerModule, TokenizerPhaseJob
from bridle.training.ranks import Ranks
from bridle.training.schedule import cold_start_of, tokenizer_phase_of
from bridle.training.speed import Rate
from bridle.training.stopping import StopRequest
from bridle.training.watchdog import Watchdog

TokenizerT = TypeVar("TokenizerT", bound=Tokenizer)
LATENTS = 4096
"""Random latents that codebooks are initialised from."""
ENDLESS = 1_000_000
"""Steps of a phase that is never run to its end."""


class Workbench:
    """Builds the engine, loader and job of any phase, as a run would.

    Args:
        recipe: `clip.mean` and `std` may be auto, which changes no speed; without `data`, the sample that ships.
        given, where: DeepSpeed's configuration, and what to call it in messages.
        folder: for what the parts of a run want to have a place for; nothing is written.

    Raises:
        RecipeError, ShardError: as a run would.
    """

    def __init__(self, recipe: Recipe, given: Mapping[str, Any], where: str, ranks: Ranks, folder: Path) -> None:
        clip = {name: value for name, value in recipe.clip.items() if value != AUTO}
        self.recipe = recipe = recipe.model_copy(update={"clip": clip})
        self.ranks, self.folder = ranks, folder
        self.ds_config = resolve_ds_config(given, where, recipe.train, ranks.world)
        check_with_deepspeed(self.ds_config, where)
        self.bf16 = uses_bf16(self.ds_config)
        self.modality = build_modality(recipe.modality, recipe.clip)
        patch = patch_shape(self.modality)
        grid = tuple(self.modality.grid.values())
        check_recipe(recipe, grid)
        self.make = Components(recipe.model, patch)
        self.flops = ClipFlops(recipe, patch, grid)
        sources = recipe.data.mixture or [DataSource(shards=[f"builtin:{recipe.modality}"])]
        self.shards = open_mixture(
            [(source.shards, source.weight) for source in sources],
            extensions=self.modality.extensions, cache=recipe.data.cache, cache_gb=recipe.data.cache_gb,
        )  # fmt: skip

    def phase(self, index: int) -> PhaseRun:
        """Phase `index`, at its first step."""
        settings, recipe = self.recipe.phases[index], self.recipe
        assert isinstance(settings, TrainedPhase)
        job = self.job(index)
        engine = build_engine(job.module, self.ds_config, recipe.train, settings.lr, job.slow_part, job.rate_of)
        deliver = Delivery(raw_modality(recipe), self.ranks.device)
        make = MakeClip(deliver.modality, recipe.mask if job.masked else None, augment=True)
        stream = Stream(
            self.shards, make, seed=recipe.seed, block=recipe.data.shuffle_block, window=recipe.data.shuffle_window
        )
        return PhaseRun(
            index=index,
            settings=settings,
            job=job,
            engine=engine,
            stream=stream,
            heldout=None,
            length=Length(ENDLESS, 0),
            train=recipe.train,
            data=recipe.data,
            ranks=self.ranks,
            checkpoints=PhaseCheckpoints(self.folder, index, settings.kind),
            keeper=Keeper(self.ranks),
            run_log=None,
            stop=StopRequest(),
            watchdog=Watchdog(self.ranks, recipe.train.collective_timeout, self.folder, ending=lambda said: None),
            where=str(self.folder),
            rate=Rate(self.flops.of_phase(index), peak=math.inf),
            deliver=deliver,
        )

    def job(self, index: int) -> PhaseJob:
        """What phase `index` trains, and the frozen half beside it, compiled and recomputed as the recipe says."""
        return self._job(index).prepare(self.recipe.train)

    def _job(self, index: int) -> PhaseJob:
        phase, make, quantizer = self.recipe.phases[index], self.make, self.recipe.model.quantizer
        common: dict[str, Any] = {"quantizer": quantizer, "device": self.ranks.device, "bf16": self.bf16}
        if isinstance(phase, EncoderPhase):
            cold = tokenizer_phase_of(self.recipe, index) == cold_start_of(self.recipe)
            tokenizer = self._cold_start() if cold else self._tokenizer()
            return EncoderPhaseJob(
                encoder=make.encoder(0),
                decoder=make.decoder(1),
                tokenizer=tokenizer,
                soft_codes=phase.soft_codes,
                **common,
            )
        encoder, learner = make.encoder(0), self._tokenizer()
        standardized, joint = getattr(phase, "target", "raw") == "standardized", isinstance(phase, JointPhase)
        target = TargetScale(encoder.width, follows=joint) if standardized else None
        if isinstance(phase, JointPhase):
            return JointPhaseJob(
                students=EncoderModule(encoder, make.decoder(1)),
                tokenizers=TokenizerModule(learner, make.estimator(2), quantizer.cosine_weight, target),
                settings=phase,
                control=self._cold_start(),
                **common,
            )
        return TokenizerPhaseJob(
            tokenizer=learner,
            estimator=make.estimator(2),
            encoder=encoder,
            target=target,
            control=self._cold_start(),
            **common,
        )

    def _cold_start(self) -> Tokenizer:
        return _initialised(self.make.cold_start_tokenizer(3))

    def _tokenizer(self) -> LearnedTokenizer:
        return _initialised(self.make.tokenizer(4))


def trained_phases(recipe: Recipe) -> list[int]:
    """Indices of the phases that train."""
    return [i for i, phase in enumerate(recipe.phases) if not isinstance(phase, ColdStartPhase)]


def with_batch(recipe: Recipe, micro: int | None, accumulation: int, world: int) -> Recipe:
    """The recipe with steps of `accumulation` micro-batches on each of `world` ranks; micro: none: the recipe's own."""
    train: TrainSettings = recipe.train
    micro = micro or train.micro_batch_size or max(1, train.batch_size // world)
    changed = {"micro_batch_size": micro, "batch_size": micro * accumulation * world}
    return recipe.model_copy(update={"train": train.model_copy(update=changed)})


def _initialised(tokenizer: TokenizerT) -> TokenizerT:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(LATENTS, tokenizer.quantizer.settings.dim, generator=generator)
    tokenizer.quantizer.initialize(latents, generator)
    return tokenizer
