"""Fine-tuning: an encoder and a head learn labels, and a classifier folder comes out."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bridle.classifier import Classifier, is_whole_classifier, new_config, save_classifier
from bridle.data.chosen import ChosenOrder
from bridle.data.shards import ShardSet
from bridle.data.stream import Stream
from bridle.errors import MistakeError
from bridle.evaluation.classification import Scored, figures, plain, spelled, write_scores
from bridle.evaluation.probe import Labelled, read_labels
from bridle.evaluation.probe_scores import folds_of
from bridle.files import sha256
from bridle.finetune_recipe import FinetunePhase, FinetuneRecipe, StartSettings
from bridle.hub import local_folder
from bridle.model_folder import patch_shape, read_config
from bridle.modeling.classifier import build_classifier
from bridle.modeling.masking import hidden_count
from bridle.seeds import SeedPart
from bridle.settings import RecipeError
from bridle.training.checkpoints import PhaseCheckpoints, read_position, read_tensors
from bridle.training.classifying import FinetuneJob
from bridle.training.clips import Delivery
from bridle.training.fits import check_mask, check_width
from bridle.training.flops import TRAINED, encoder_flops
from bridle.training.heldout_scores import score_files
from bridle.training.keeper import Keeper
from bridle.training.labelled import LabelledStream, Labels, order_of
from bridle.training.metrics import RunLog
from bridle.training.ranks import Ranks
from bridle.training.shared_tensors import SharedTensors, fill
from bridle.training.standing import Standing
from bridle.training.walk import PhaseWalk

log = logging.getLogger("bridle")
MADE_FOLD = r"([1-9]\d*)/([1-9]\d*)"
"""A fold that no member names: I/N is the I-th of N."""
RESULT = "classifier"
"""Of a run folder: the classifier."""


class FinetuneRun(PhaseWalk[FinetuneRecipe]):
    """A run of one phase, which begins with a model folder's encoder or, from scratch, with random weights."""

    def __init__(
        self, recipe: FinetuneRecipe, ds_config: Any, where: str, *, model: str | None, scratch: bool, ranks: Ranks,
        **options: Any,
    ) -> None:  # fmt: skip
        """As `PhaseWalk`; model: folder or name on the hub, of rank 0; scratch: take its shape alone."""
        self.model = model
        found = ranks.on_first(partial(_with_start, recipe, model, scratch))
        super().__init__(FinetuneRecipe.model_validate(found), ds_config, where, ranks=ranks, **options)

    def _delivery(self) -> Delivery:
        """Mixed clips are finished in the loaders: bytes cannot be mixed without rounding."""
        if self.recipe.phase.mixup.share:
            return Delivery(self.modality, self.ranks.device)
        return super()._delivery()

    def _flops(self, index: int) -> float:
        grid, mask = tuple(self.modality.grid.values()), self.recipe.phase.mask
        seen = math.prod(grid) - (0 if mask is None else hidden_count(mask, grid))
        return encoder_flops(self.encoder_settings, patch_shape(self.modality), seen, TRAINED)

    def _begin(self) -> None:
        """Labels, read by rank 0 and told to the others."""
        assert self.recipe.encoder is not None
        self.encoder_settings = self.recipe.encoder
        grid = tuple(self.modality.grid.values())
        check_width(self.encoder_settings.width, grid, "encoder.width")
        if self.recipe.phase.mask is not None:
            check_mask(self.recipe.phase.mask, grid, "phases.0.")
        found = self.ranks.on_first(self._read_labels)
        names = found["names"]
        self.labels = Labels.of(found["train"], names)
        self.tested = Labels.of(found["heldout"], names) if found["heldout"] else None
        self.several = not self.labels.one_each
        if self.several and self.recipe.phase.loss == "ce":
            raise RecipeError("phases.0.loss: ce needs one label a file, and some have several; set it to bce")

    @property
    def heldout_shards(self) -> ShardSet:
        """Where held-out files are."""
        return self.shards if self.heldout is None else self.heldout

    def _read_labels(self) -> dict[str, Any]:
        recipe = self.recipe
        if any(source.weight != 1 for source in recipe.data.mixture):
            raise RecipeError("data.sources: weights of sources mean nothing to fine-tuning; see phases.0.weighted")
        made = re.fullmatch(MADE_FOLD, recipe.fold or "")
        train, without = read_labels(self.shards, recipe.labels, recipe.fold_of if recipe.fold and not made else None)
        tested: list[Labelled] = []
        if recipe.fold is not None:
            folds = made_folds(train, self.shards, int(made[2]), recipe.fold) if made else [f.group for f in train]
            wanted = made[1] if made else recipe.fold
            tested = [file for file, fold in zip(train, folds, strict=True) if fold == wanted]
            train = [file for file, fold in zip(train, folds, strict=True) if fold != wanted]
            if not tested or not train:
                there = ", ".join(sorted(set(folds)))
                raise RecipeError(f"fold '{recipe.fold}': the shards have folds {there}, expected several")
        elif self.heldout is not None:
            tested, _ = read_labels(self.heldout, recipe.labels, None)
        names = sorted({label for file in train for label in file.labels})
        if len(names) < 2:
            raise RecipeError(f"labels: all training files have the label '{names[0]}'; a classifier needs two or more")
        known = {name: number for number, name in enumerate(names)}
        strange = Counter(label for file in tested for label in file.labels if label not in known)
        told = f"; {without} without a label are left out" if without else ""
        log.info("%d training files of %d classes, %d held out%s", len(train), len(names), len(tested), told)
        if strange:
            log.warning("held-out labels that no training file has: %s", ", ".join(sorted(strange)[:10]))
        return {
            "names": names,
            "train": [[file.number, [known[label] for label in file.labels]] for file in train],
            "heldout": [
                [file.number, [known[label] for label in file.labels if label in known]]
                for file in tested
                if any(label in known for label in file.labels)
            ],
        }

    def _stream(self, index: int, masked: bool, origin: int = 0) -> Stream:
        data, phase = self.recipe.data, self.recipe.phase
        seed = self._seed(index, SeedPart.ORDER)
        return LabelledStream(
            self.shards, self.deliver.modality, self.labels, mask=phase.mask, mixup=phase.mixup,
            branches=self.encoder_settings.depth if phase.drop_path else 0,
            seed=seed, block=data.shuffle_block, window=data.shuffle_window, origin=origin,
            order=order_of(self.labels, self.shards, seed, phase.weighted, origin),
        )  # fmt: skip

    def _heldout_stream(self, masked: bool) -> Stream | None:
        if self.tested is None:
            return None
        shards, seed = self.heldout_shards, self.recipe.seed
        order = ChosenOrder(shards.counts, self.tested.chosen, seed)
        return LabelledStream(
            shards, self.deliver.modality, self.tested, augment=False, seed=seed, block=1, window=1, order=order
        )

    def _job(self, index: int, phase: FinetunePhase, fresh: bool) -> FinetuneJob:
        classifier = build_classifier(
            self.encoder_settings, patch_shape(self.modality), len(self.labels.names), self._seed(index, SeedPart.HEAD)
        )
        start = self.recipe.start
        if fresh and start is not None and not start.scratch:
            folder = local_folder(self.model) if self.ranks.first and self.model else Path()
            state = {f"encoder.{name}": value for name, value in classifier.encoder.state_dict().items()}
            shapes = {name: value.shape for name, value in state.items()}
            tensors = SharedTensors(folder / "model.safetensors", shapes, self.ranks, exactly=False)
            for name, value in state.items():
                value.copy_(tensors.read(name, value.shape, value.dtype))
        return FinetuneJob(classifier, phase, self.several, self.ranks.device, self.bf16)

    def _run_phase(self, index: int, standing: Standing, run_log: RunLog | None, keeper: Keeper) -> None:
        anew = index >= standing.phase
        if anew:
            self._train(index, self.recipe.phase, standing.step, run_log, keeper)
        target = self.folder / RESULT
        if anew or not self.ranks.on_first(lambda: is_whole_classifier(target)):
            self._leave(index, target)
        keeper.push()

    def _leave(self, index: int, target: Path) -> None:
        """Scores the held-out files and writes the classifier folder; all ranks call it."""
        finished = self._checkpoints(index).finished
        module = build_classifier(self.encoder_settings, patch_shape(self.modality), len(self.labels.names), 0)
        fill(module, finished / "classifier.safetensors", self.ranks)
        recipe = self.recipe
        config = new_config(
            name=self.folder.resolve().name, modality=recipe.modality,
            clip=self.modality.settings.model_dump(mode="json"), encoder=self.encoder_settings,
            classes=self.labels.names, loss=recipe.phase.loss,
        )  # fmt: skip
        scored = None
        if self.tested is not None:
            classifier = Classifier(config, self.modality, module.to(self.ranks.device), digest="")
            scored = self._scored(classifier, self.tested)
        self.ranks.on_first(lambda: self._write(index, target, config, scored))

    def _scored(self, classifier: Classifier, tested: Labels) -> Scored:
        shards = self.heldout_shards
        scores = score_files(
            classifier, shards, tested.chosen.tolist(), self.recipe.views, self.ranks, self._stop_if_asked,
            self.recipe.data.workers,
        )  # fmt: skip
        read = ~scores.isnan().any(1)
        if not bool(read.any()):
            raise MistakeError("no held-out file could be read; the warnings above say why")
        places = [shards.where(number) for number in tested.chosen.tolist()]
        files = [f"{Path(shard).name}/{key}" for (shard, key), good in zip(places, read.tolist(), strict=True) if good]
        targets = torch.stack([tested.targets(number) for number in tested.chosen.tolist()])[read] > 0
        return Scored(files, self.labels.names, scores[read].float(), targets, self.several)

    def _write(self, index: int, target: Path, config: Any, scored: Scored | None) -> None:
        recipe, start = self.recipe, self.recipe.start
        position = read_position(PhaseCheckpoints(self.folder, index, recipe.phase.kind).finished)
        trained = {
            "start": "random weights" if start is None or start.scratch else start.name,
            "start_sha256": None if start is None or start.scratch else start.sha256,
            "run": self.folder.resolve().name, "steps": position.step, "clips": position.samples,
            "data": [pattern for source in recipe.data.mixture for pattern in source.shards],
        }  # fmt: skip
        heldout = None
        if scored is not None:
            found = figures(scored.scores, scored.targets, scored.several)
            write_scores(self.folder, scored)
            views = recipe.views.model_dump()
            heldout = {"files": len(scored.files), "fold": recipe.fold, "views": views, "figures": plain(found)}
            told = ", ".join(f"{name.replace('_', ' ')} {spelled(figure)}" for name, figure in found.items())
            log.info("%d held-out files: %s", len(scored.files), told)
        weights = read_tensors(self._checkpoints(index).finished / "classifier.safetensors")
        save_classifier(target, config.model_copy(update={"trained": trained}), weights, heldout)
        log.info("classifier written to %s", target)


def made_folds(files: Sequence[Labelled], shards: ShardSet, count: int, asked: str) -> list[str]:
    """Of each file, its fold from 1 to `count`, as `bridle probe` makes them: each class spread over all folds. Where
    the shards lie does not count, as they may be moved, but their order.

    Raises:
        RecipeError: fewer files than folds.
    """
    names = sorted({label for file in files for label in file.labels})
    targets = torch.zeros(len(files), len(names), dtype=torch.bool)
    for row, file in enumerate(files):
        targets[row, [names.index(label) for label in file.labels]] = True
    places = [shards.where(file.number) for file in files]
    order = {shard: number for number, shard in enumerate(dict.fromkeys(shard for shard, _ in places))}
    groups = [f"{order[shard]:09d}, key {key}" for shard, key in places]
    try:
        return [str(1 + fold) for fold in folds_of(groups, targets, count, 0).tolist()]
    except MistakeError:
        raise RecipeError(f"fold '{asked}': found {len(files)} labelled files; ask for fewer folds") from None


def _with_start(recipe: FinetuneRecipe, model: str | None, scratch: bool) -> dict[str, Any]:
    """The recipe with the model folder's encoder, clip settings and name, as plain data."""
    if model is None:
        if recipe.encoder is None:
            raise RecipeError("give --model MODEL_FOLDER, or a recipe with an encoder, which then begins from scratch")
        return recipe.model_dump(mode="json")
    folder = local_folder(model)
    config = read_config(folder)
    if config.modality != recipe.modality:
        raise RecipeError(f"--model {model}: a model for {config.modality}, and the recipe is for {recipe.modality}")
    if recipe.encoder is not None and recipe.encoder != config.encoder:
        raise RecipeError(f"--model {model}: its encoder is not the recipe's; leave `encoder` out of the recipe")
    start = StartSettings(name=config.name, sha256=sha256(folder / "model.safetensors"), scratch=scratch)
    begun = recipe.model_copy(update={"encoder": config.encoder, "clip": config.clip | recipe.clip, "start": start})
    return begun.model_dump(mode="json")
