"""The typed recipe: every scientific choice of a run, checked before anything starts.

A recipe is YAML. Unknown keys are errors that name the nearest known key; booleans are booleans; nothing is read from
anywhere else. `load_recipe` merges a shipped or user-written file with ``dotted.key=value`` overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bridle.recipe_files import read_recipe_file
from bridle.settings import JudgedByContent, MayChange, RecipeError, Settings, nearest, parse_settings

Positive = Annotated[int, Field(gt=0)]
MAY_CHANGE, JUDGED_BY_CONTENT = MayChange(), JudgedByContent()
Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
SEEDS = 9 * 10**14
"""Seeds of a run are below it, so that those of its parts (`phase_seed`) fit 63 bits."""


class TransformerSettings(Settings):
    """Width, depth and heads of one transformer."""

    width: Positive
    """Model width."""
    depth: Positive
    """Number of blocks."""
    heads: Positive
    """Attention heads; must divide the width."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerSettings:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}; choose heads that do")
        return self


class EncoderSettings(TransformerSettings):
    """The main encoder, and the tokenizer's encoder, which has the same architecture."""

    class_token: bool = True
    """Whether a class token is prepended (audio and image: yes, video: no)."""


class DecoderSettings(TransformerSettings):
    """The main decoder, which predicts codes over the whole grid."""

    kind: Literal["swin", "transformer"] = "swin"
    """Swin blocks over a 2-D grid, or plain transformer blocks over any grid."""
    window: Positive = 4
    """Side of the Swin window, in patches."""


class EstimatorSettings(Settings):
    """The tokenizer estimator, from quantized latents to the encoder's embeddings; it has the encoder's width."""

    depth: Positive = 3
    """Number of blocks."""
    attention: bool = True
    """Transformer blocks (the paper's), or residual perceptrons that see one position at a time (as in Eq. 6)."""


class QuantizerSettings(Settings):
    """The residual quantizer; one codebook makes it plain vector quantization."""

    codebooks: Positive = 4
    """M, the number of residual stages."""
    codebook_size: Annotated[int, Field(ge=2)] = 256
    """K, codes per codebook."""
    dim: Positive = 256
    """d, width of a code."""
    norm: Literal["input", "every"] = "input"
    """Normalise the latent once (Eqs. 1-3 hold as written), or every stage's residual."""
    decay: Ratio = 0.99
    """gamma of Eqs. 10 and 12."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """epsilon of Eq. 11."""
    init: Literal["kmeans", "uniform"] = "kmeans"
    """k-means on the first batch, or uniform in [-1, 1] scaled to the input."""
    kmeans_iterations: Positive = 10
    """Lloyd steps per stage."""
    reset_threshold: Annotated[int, Field(ge=0)] = 1
    """T_u: a code used less often than this in a phase's first batch becomes a random latent of that batch."""
    beta: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the commitment term of Eq. 5."""
    cosine_weight: Annotated[float, Field(ge=0)] = 1.0
    """lambda_cos of Eq. 7."""


class ModelSettings(Settings):
    """All four components."""

    encoder: EncoderSettings
    decoder: DecoderSettings
    estimator: EstimatorSettings = EstimatorSettings()
    quantizer: QuantizerSettings = QuantizerSettings()


class MaskSettings(Settings):
    """What the encoder phase hides."""

    kind: Literal["random", "time_frequency", "tube"] = "random"
    """Random patches; whole rows and columns of a 2-D grid; or the same patches at every time step."""
    ratio: Ratio = 0.8
    """Share of patches hidden."""


WEIGHTS = (0.001, 1000.0)
"""Least and largest weight of a source."""


class DataSource(Settings):
    """One of several sources that are mixed."""

    shards: Annotated[list[str], Field(min_length=1)]
    """As `data.shards`."""
    weight: Annotated[float, Field(strict=True, ge=WEIGHTS[0], le=WEIGHTS[1], allow_inf_nan=False)] = 1.0
    """How often an epoch sees each sample of this source: 2 twice, 0.5 every other epoch."""


class DataSettings(Settings):
    """Where clips come from and how they are read."""

    shards: Annotated[list[str] | None, JUDGED_BY_CONTENT] = None
    """Paths, globs or brace patterns; local, URLs (docs/data.md) or pipe:. `builtin:MODALITY` is the sample."""
    sources: Annotated[Annotated[list[DataSource], Field(min_length=1)] | None, JUDGED_BY_CONTENT] = None
    """Instead of `shards`: several sources, each with a weight."""
    heldout: Annotated[list[str] | None, JUDGED_BY_CONTENT] = None
    """The same, for the clips that only evaluation sees; none: no held-out evaluation."""
    workers: Annotated[int, Field(ge=0), MAY_CHANGE] = 2
    """Loader processes per rank."""
    features_on_device: bool = False
    """Whether spectrograms are computed where the model is instead of in the loaders: the same to rounding (1e-5).
    Pictures and films are normalised there in any case."""
    shuffle_block: Positive = 16
    """Neighbouring samples that stay together when blocks are permuted."""
    shuffle_window: Positive = 64
    """Permuted blocks whose samples are then mixed."""
    max_corrupt: Annotated[float, Field(ge=0, le=1), MAY_CHANGE] = 0.01
    """Share of samples that may fail to decode before the run stops; above 0, one always may."""
    cache: Annotated[str | None, MAY_CHANGE] = None
    """Folder for remote shards; default: the user's cache folder."""
    cache_gb: Annotated[float, Field(gt=0), MAY_CHANGE] = 50.0
    """Bound on that folder, in gigabytes (10^9 bytes)."""

    @model_validator(mode="after")
    def _shards_or_sources(self) -> DataSettings:
        if self.shards is not None and self.sources is not None:
            raise ValueError("give either data.shards or data.sources; set the other one to null")
        return self

    @property
    def mixture(self) -> list[DataSource]:
        """What to train on, whichever way it was given; empty where nothing was."""
        return self.sources or ([DataSource(shards=self.shards)] if self.shards else [])


class TrainSettings(Settings):
    """The optimizer and the loop."""

    batch_size: Positive
    """Clips per optimizer step over all ranks and accumulation steps."""
    micro_batch_size: Annotated[Positive | None, MAY_CHANGE] = None
    """Clips per forward pass and rank at most; none: batch_size over the number of ranks."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decay of matrices; biases and norms have none."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Norm to which gradients are clipped; 0: not at all."""
    log_every: Annotated[Positive, MAY_CHANGE] = 10
    """Optimizer steps between two rows of metrics."""
    checkpoint_every: Annotated[Positive, MAY_CHANGE] = 500
    """Optimizer steps between two checkpoints."""
    evaluate_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Optimizer steps between two held-out evaluations; 0: only at the end of a phase."""
    evaluate_clips: Annotated[Positive, MAY_CHANGE] = 256
    """Held-out clips looked at, at most."""
    collective_timeout: Annotated[float, Field(gt=0, le=1e9), MAY_CHANGE] = 600.0
    """Seconds that ranks wait for each other, at the start and in a step; then the run ends, naming who is missing."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Have torch compile the transformers' blocks: minutes at the start, then fewer kernels. Not with ZeRO stage 3."""
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535), MAY_CHANGE] = 9464
    """Port of rank 0's metrics; a taken port is replaced by a free one, which is logged; 0: off."""


class ColdStartPhase(Settings):
    """Iteration 1's tokenizer: a frozen random projection, its quantizer initialised on the first batch."""

    kind: Literal["cold_start"]


class TrainedPhase(Settings):
    """What all phases but the cold start share: a length and a learning rate."""

    kind: str
    """What is trained."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate: linear warm-up, then cosine to 0."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length in passes over the data; give this or `steps`."""
    steps: Positive | None = None
    """Length in optimizer steps; give this or `epochs`."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """Warm-up in passes over the data."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in optimizer steps."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainedPhase:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give a phase either epochs or steps")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("give a phase either warmup_epochs or warmup_steps")
        return self


class EncoderPhase(TrainedPhase):
    """Eq. 4: encoder and decoder learn to predict the frozen tokenizer's codes of masked patches."""

    kind: Literal["encoder"]
    init: Literal["continue", "scratch"] = "continue"
    """Start from the previous encoder phase's weights, or afresh."""
    soft_codes: Positive = 1
    """Nearest codes of each stage that share the target evenly; 1: only the nearest, as in Eq. 4."""


class TokenizerPhase(TrainedPhase):
    """Eqs. 5-7: a fresh tokenizer and estimator learn from the frozen encoder."""

    kind: Literal["tokenizer"]
    target: Literal["raw", "standardized"] = "raw"
    """What the estimator predicts: the encoder's embeddings e (Eq. 6), or (e - mu) / sigma of each feature, with mu and
    sigma over the phase's first batches; raw embeddings share a large part, which small models settle on."""
    init: Literal["scratch", "teacher"] = "scratch"
    """Start the tokenizer's encoder afresh, or from the weights of the encoder it learns from."""


class JointPhase(TrainedPhase):
    """Eq. 8: all four components in one phase, each half learning from the other as it is at that step."""

    kind: Literal["joint"]
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the tokenizer's loss beside the encoder's."""
    tokenizer_every: Positive = 5
    """Steps of the encoder to one of the tokenizer, whose weights and codebooks rest in between."""
    teacher: Literal["slow", "current"] = "slow"
    """Whose embeddings the tokenizer learns: a slow copy of the encoder, or the encoder itself."""
    teacher_decay: Ratio = 0.99
    """What a slow copy keeps of itself at each step of the tokenizer."""
    target: Literal["raw", "standardized"] = "standardized"
    """As a tokenizer phase's; mean and deviation follow the encoder."""
    init: Literal["continue", "scratch"] = "continue"
    """Start encoder and tokenizer from the phases before, where there are any, or afresh."""


Phase = Annotated[ColdStartPhase | EncoderPhase | TokenizerPhase | JointPhase, Field(discriminator="kind")]


class RunSettings(Settings):
    """What every run has, whatever it trains."""

    modality: str
    """Name in the registry of modalities."""
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0
    """Seed of weights, order, augmentation and masks."""
    clip: dict[str, Any] = Field(default_factory=dict)
    """The modality's own settings (see bridle/modalities/)."""
    data: DataSettings = DataSettings()
    train: TrainSettings
    phases: Sequence[ColdStartPhase | TrainedPhase]
    """What is trained, one after another."""


class Recipe(RunSettings):
    """One pretraining run."""

    model: ModelSettings
    mask: MaskSettings = MaskSettings()
    phases: Annotated[list[Phase], Field(min_length=1)]

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> Recipe:
        seen: set[str] = set()
        for i, phase in enumerate(self.phases):
            if phase.kind == "encoder" and not seen & {"cold_start", "tokenizer", "joint"}:
                raise ValueError(f"phases.{i} is an encoder phase without a tokenizer before it; begin with cold_start")
            if phase.kind == "joint" and "cold_start" not in seen:
                raise ValueError(f"phases.{i} is a joint phase without a cold start before it to compare with")
            if phase.kind == "tokenizer" and not seen & {"encoder", "joint"}:
                raise ValueError(f"phases.{i} is a tokenizer phase without an encoder before it to learn from")
            if isinstance(phase, EncoderPhase) and phase.soft_codes > self.model.quantizer.codebook_size:
                raise ValueError(
                    f"phases.{i}.soft_codes {phase.soft_codes} is more than the"
                    f" {self.model.quantizer.codebook_size} codes of a codebook (model.quantizer.codebook_size)"
                )
            seen.add(phase.kind)
        return self


def refuse_finetuning(raw: Mapping[str, Any], run: str) -> None:
    """For what reads pretraining runs, by a recipe as plain data.

    Raises:
        RecipeError: it is one of fine-tuning.
    """
    phases = raw.get("phases")
    kinds = [phase.get("kind") for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    if "finetune" in kinds:
        raise RecipeError(f"{run}: a fine-tuning run; its classifier, with its figures, is {run}/classifier")


SIZES: dict[str, dict[str, dict[str, int]]] = {
    name: {
        "encoder": {"width": encoder[0], "depth": encoder[1], "heads": encoder[2]},
        "decoder": {"width": decoder[0], "depth": decoder[1], "heads": decoder[2]},
        "estimator": {"depth": estimator},
    }
    for name, encoder, decoder, estimator in (
        ("tiny", (96, 4, 3), (64, 2, 2), 1),
        ("small", (384, 12, 6), (256, 8, 8), 3),
        ("base", (768, 12, 12), (512, 16, 16), 3),
        ("large", (1024, 24, 16), (512, 16, 16), 3),
    )
}
"""What `model.size` stands for; keys given beside it win."""


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a shipped recipe by name or a YAML file by path, and applies ``dotted.key=value`` overrides.

    Raises:
        RecipeError: unknown recipe, unknown key, wrong value, malformed YAML or override.
    """
    return recipe_from_mapping(read_recipe_file(name, overrides), name)


def recipe_from_mapping(raw: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain data; `model.size` is replaced by what it stands for.

    Raises:
        RecipeError: see `parse_settings`.
    """
    raw = dict(raw)
    if isinstance(raw.get("model"), Mapping):
        raw["model"] = _expand_size(raw["model"], where)
    return parse_settings(Recipe, raw, f"recipe {where}")


def _expand_size(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    model = dict(model)
    size = model.pop("size", None)
    if size is None:
        return model
    if str(size) not in SIZES:
        raise RecipeError(f"recipe {where}: model.size '{size}' is unknown{nearest(str(size), SIZES)}")
    for part, defaults in SIZES[str(size)].items():
        given = model.get(part, {})
        if isinstance(given, Mapping):
            model[part] = {**defaults, **given}
    return model
