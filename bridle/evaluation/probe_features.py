"""What a probe reads of each file: the model's features, pooled over the content of all windows, and the controls'."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional

from bridle.config import DecoderSettings, ModelSettings
from bridle.errors import MistakeError
from bridle.evaluation.codebooks import ReadWindow, Skipped, Windows
from bridle.evaluation.probe_scores import READERS
from bridle.model_folder import BridleModel, patch_shape
from bridle.modeling.bridle import Components
from bridle.modeling.tokenizer import Tokenizer

CONTROL_SEEDS = (910_001, 910_002, 910_003, 910_004, 910_005)
"""Of the controls' weights; a control's score is the mean over them. One random encoder differs from the next by as
much as one draw of a few hundred files from the next."""
FIRST_FILES = 64
"""At most so many files, evenly spread, give the cold start its codebooks."""
FIRST_WINDOWS = 4
"""At most so many windows of each of them."""
FIRST_LATENTS = 32_768
BATCH = 8
"""Windows per forward pass."""
GRID = 4
"""Side of the coarse picture in the pixels' statistics."""
PARTS = {"frequency": 4}
"""Parts of an axis of the grid that embeddings are pooled over apart, for the regions; 2 of any other."""


@dataclass(frozen=True)
class Feature:
    """One number vector a file.

    copies: float32 ``[n, D]`` each: one of a model, one a seed of a control. scaled: whether columns are put in units
    of their deviations before they are read; histograms are not, as that would raise the noise of rare codes.
    """

    name: str
    copies: list[Tensor]
    scaled: bool = True


@dataclass(frozen=True)
class Comparison:
    """A feature, the control it should beat, and by which readers that is one of the claims told in words."""

    feature: str
    control: str
    told: tuple[str, ...] = ()


class NumberedWindows(torch.utils.data.IterableDataset[tuple[int, ReadWindow | Skipped]]):
    """The windows of chosen files, each with the number of its file; loader processes share the files out."""

    def __init__(self, windows: Windows, files: Sequence[int]) -> None:
        self.windows, self.files = windows, files

    def __iter__(self) -> Iterator[tuple[int, ReadWindow | Skipped]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in self.files[first::step]:
            for item in self.windows.of(index):
                yield index, item


@dataclass
class _Pool:
    """Sums over a file's content, of one model. regions: float64 ``[R, D]``, of embeddings by region, and held: int64
    ``[R]``, positions of each; squares: float64 ``[D]``; counts: float32 ``[M K]``; latents: float32 ``[d]``."""

    positions: int = 0
    regions: Tensor | float = 0.0
    held: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    counts: Tensor | float = 0.0
    latents: Tensor | float = 0.0


@dataclass
class _File:
    pools: list[_Pool]
    windows: int = 0
    statistics: Tensor | float = 0.0


@dataclass
class Pooled:
    """Features of the files that could be read. files: their numbers, in order; skipped: what could not be, and why."""

    files: list[int]
    features: list[Feature]
    skipped: list[str] = field(default_factory=list)


def control_models(model: BridleModel, windows: Windows, files: Sequence[int]) -> list[BridleModel]:
    """One control a seed: the model's encoder with random weights, and the cold start's tokenizer.

    The tokenizer is a random projection with the model's quantizer settings, its codebooks made, as a run begins, from
    the content of some of `files`, which should be those that the readers learn from.

    Raises:
        ValueError: none of them can be decoded.
    """
    settings = ModelSettings(
        encoder=model.config.encoder,
        decoder=DecoderSettings(width=model.config.encoder.width, depth=1, heads=model.config.encoder.heads),
        quantizer=model.config.quantizer,
    )
    components = Components(settings, patch_shape(model.modality))
    tokenizers = [components.cold_start_tokenizer(seed) for seed in CONTROL_SEEDS]
    first = _first_latents(tokenizers, windows, files[:: max(1, -(-len(files) // FIRST_FILES))])
    controls = []
    for seed, tokenizer, latents in zip(CONTROL_SEEDS, tokenizers, first, strict=True):
        tokenizer.quantizer.initialize(latents, torch.Generator().manual_seed(seed))
        dtype = model.encoder.embed.weight.dtype
        encoder = components.encoder(seed).to(device=model.device, dtype=dtype)
        placed = tokenizer.to(device=model.device, dtype=dtype)
        controls.append(BridleModel(model.config, model.modality, encoder, placed, digest=""))
    return controls


@torch.no_grad()
def _first_latents(tokenizers: Sequence[Tokenizer], windows: Windows, files: Sequence[int]) -> list[Tensor]:
    """Latents ``[S, d]`` of each tokenizer, evenly spread over the content of the first windows of each file."""
    most = max(1, FIRST_LATENTS // (len(files) * FIRST_WINDOWS))
    found: list[list[Tensor]] = [[] for _ in tokenizers]
    for index in files:
        for item in islice(windows.of(index), FIRST_WINDOWS):
            if isinstance(item, ReadWindow) and item.positions:
                for tokenizer, latents in zip(tokenizers, found, strict=True):
                    content = tokenizer.latents(item.values[None])[0, : item.positions]
                    latents.append(content[:: -(-item.positions // most)].clone())
    if not found[0]:
        raise MistakeError(f"none of the first {len(files)} files could be decoded as {windows.modality.name}")
    return [torch.cat(latents) for latents in found]


@torch.inference_mode()
def pooled(
    model: BridleModel, controls: Sequence[BridleModel], items: Iterable[tuple[int, ReadWindow | Skipped]]
) -> Pooled:
    """The features of every file whose windows come, of the model, the controls and the values themselves.

    Raises:
        ValueError: no window could be read, or the model gives values that are not finite.
    """
    models = [model, *controls]
    files: dict[int, _File] = {}
    skipped: list[str] = []
    batch: list[tuple[int, ReadWindow]] = []

    def flush() -> None:
        values, positions = torch.stack([item.values for _, item in batch]), [item.positions for _, item in batch]
        for number, each in enumerate(models):
            _add(each, values, positions, [files[index].pools[number] for index, _ in batch])
        batch.clear()

    for index, item in items:
        if isinstance(item, Skipped):
            skipped.append(item.reason)
            continue
        file = files.setdefault(index, _File([_Pool() for _ in models]))
        file.windows += 1
        file.statistics = file.statistics + _statistics(model, item)
        batch.append((index, item))
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    if not files:
        raise MistakeError(f"none of {len(skipped)} files could be read; the first: {(skipped or ['no file'])[0]}")
    numbers = sorted(files)
    return Pooled(numbers, _features(model, [files[number] for number in numbers]), skipped)


def _add(model: BridleModel, values: Tensor, positions: list[int], pools: list[_Pool]) -> None:
    embeddings, codes = model.embed(values, positions).cpu(), model.codes(values, positions).cpu()
    quantizer = model.config.quantizer
    shift = quantizer.codebook_size * torch.arange(quantizer.codebooks)
    for count, embedded, coded, pool in zip(positions, embeddings, codes, pools, strict=True):
        content, kept = embedded[:count].double(), coded[:count]
        region, regions = regions_of(model.modality.grid, count)
        pool.positions += count
        pool.regions = pool.regions + torch.zeros(regions, content.shape[1]).double().index_add(0, region, content)
        pool.held = pool.held + torch.bincount(region, minlength=regions)
        pool.squares = pool.squares + content.square().sum(0)
        histogram = torch.bincount((kept + shift).flatten(), minlength=quantizer.codebooks * quantizer.codebook_size)
        pool.counts = pool.counts + histogram.float()
        pool.latents = pool.latents + model.dequantize(kept).cpu().sum(0)


def regions_of(grid: Mapping[str, int], positions: int) -> tuple[Tensor, int]:
    """The region, int64 ``[positions]``, of each position of content, and how many regions there are.

    Regions are blocks of a coarse grid (`PARTS`) over the content: a short clip's steps in time are shared out, too.
    """
    outermost = next(iter(grid))
    steps = -(-positions // math.prod(size for axis, size in grid.items() if axis != outermost))
    region, regions = torch.zeros((), dtype=torch.int64), 1
    for axis, size in grid.items():
        length = steps if axis == outermost else size
        parts = min(PARTS.get(axis, 2), size)
        region = region[..., None] * parts + torch.arange(length) * parts // length
        regions *= parts
    return region.flatten()[:positions], regions


def _statistics(model: BridleModel, window: ReadWindow) -> Tensor:
    """float64 ``[S]`` of a window's values: of each mel band, or of each channel with a coarse picture beside."""
    values, patch = window.values.double(), model.modality.patch
    if model.modality.axes[0] == "time":
        per_step = values[0, 0].numel() // math.prod(patch[1:])
        values = values[:, : max(1, window.positions // per_step) * patch[0]]
    if model.modality.axes[-1] == "frequency":
        return torch.cat([values[0].mean(0), values[0].std(0, correction=0)])
    flat = values.flatten(1)
    picture = values.mean(1) if values.ndim > 3 else values
    coarse = functional.adaptive_avg_pool2d(picture, (GRID, GRID))
    return torch.cat([flat.mean(1), flat.std(1, correction=0), coarse.flatten()])


def statistics_name(model: BridleModel) -> str:
    """What the statistics of the values are called."""
    return "log-mel statistics" if model.modality.axes[-1] == "frequency" else "pixel statistics"


def _features(model: BridleModel, files: list[_File]) -> list[Feature]:
    own = _of([[file.pools[0] for file in files]], model, "encoder", "codes", "latents")
    others = [[file.pools[number] for file in files] for number in range(1, len(files[0].pools))]
    controls = _of(others, model, "random weights", "cold start codes", "cold start latents")
    values = torch.stack([torch.as_tensor(file.statistics) / file.windows for file in files]).float()
    features = [*own, *controls, Feature(statistics_name(model), [values])]
    for feature in features:
        if not all(bool(copy.isfinite().all()) for copy in feature.copies):
            raise MistakeError(
                f"{feature.name}: holds values that are not finite; is the model {model.config.name} damaged?"
            )
    return features


def _of(copies: list[list[_Pool]], model: BridleModel, encoder: str, codes: str, latents: str) -> list[Feature]:
    """The features of one model or of several of different seeds, under these names."""
    stages, size = model.config.quantizer.codebooks, model.config.quantizer.codebook_size
    found: dict[str, Feature] = {}
    for pools in copies:
        count = torch.tensor([[float(pool.positions)] for pool in pools])
        regions = torch.stack([torch.as_tensor(pool.regions) for pool in pools])
        held = torch.stack([torch.as_tensor(pool.held) for pool in pools]).unsqueeze(-1)
        mean = regions.sum(1) / count
        square = torch.stack([torch.as_tensor(pool.squares) for pool in pools]) / count
        # A region is empty where all of a file is shorter than its grid: then it has the file's mean.
        regions = torch.where(held > 0, regions / held.clamp(min=1), mean.unsqueeze(1))
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        # Square roots: the distance of two histograms is Hellinger's.
        shares = (torch.stack([torch.as_tensor(pool.counts) for pool in pools]) / count).sqrt()
        each = [
            Feature(f"{encoder} (mean)", [mean.float()]),
            Feature(f"{encoder} (mean+std)", [torch.cat([mean, deviation], dim=1).float()]),
            Feature(f"{encoder} (regions)", [regions.flatten(1).float()]),
            *(Feature(f"{codes} (depth {m})", [shares[:, : m * size]], scaled=False) for m in range(1, stages + 1)),
            Feature(f"{latents} (mean)", [torch.stack([torch.as_tensor(pool.latents) for pool in pools]) / count]),
        ]
        for feature in each:
            known = found.get(feature.name)
            copies_so_far = [] if known is None else known.copies
            found[feature.name] = dataclasses.replace(feature, copies=[*copies_so_far, *feature.copies])
    return list(found.values())


def comparisons(model: BridleModel) -> list[Comparison]:
    """Each feature of the model with its counterpart, and the best of each kind with the values' statistics."""
    stages, values = model.config.quantizer.codebooks, statistics_name(model)
    linear, paper = READERS[:1], READERS[2:]
    return [
        Comparison("encoder (mean)", "random weights (mean)", paper),
        Comparison("encoder (mean+std)", "random weights (mean+std)", linear),
        Comparison("encoder (mean+std)", values, linear),
        Comparison("encoder (regions)", "random weights (regions)", linear),
        Comparison("encoder (regions)", values),
        *(
            Comparison(f"codes (depth {m})", f"cold start codes (depth {m})", linear if m == stages else ())
            for m in range(1, stages + 1)
        ),
        Comparison(f"codes (depth {stages})", values, linear),
        Comparison("latents (mean)", "cold start latents (mean)", linear),
        Comparison("latents (mean)", values),
    ]
