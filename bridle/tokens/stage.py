"""Codes for pipelines that people already have: a stage for WebDataset, and what Ray's actors call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bridle.errors import MistakeError
from bridle.modalities.clip import ClipError
from bridle.modalities.joining import Place
from bridle.model_folder import BridleModel, CodeStream
from bridle.tokens.records import code_type

WINDOWS = 8
Sample = dict[str, Any]


@dataclass
class Found:
    """A file's codes, or why it has none."""

    stream: CodeStream | None = None
    error: str | None = None


@dataclass
class _File:
    """A file on its way: its clips, and the codes of those that the model has done."""

    clips: list[Place] = field(default_factory=list)
    codes: list[torch.Tensor] = field(default_factory=list)
    error: str | None = None
    read: bool = False


class Tokenizer:
    """Files to codes, windows batched across files. batch: windows in a batch."""

    def __init__(self, model: BridleModel, batch: int = WINDOWS) -> None:
        self.model, self.batch = model, batch

    def __call__(self, files: Iterable[bytes]) -> Iterator[Found]:
        """The codes of each file, in order; a file that cannot be read costs its own answer."""
        waiting: deque[_File] = deque()
        values: list[torch.Tensor] = []
        owners: list[_File] = []
        content: list[int] = []
        for data in files:
            file = _File()
            waiting.append(file)
            try:
                for clip in self.model.modality.windows(data):
                    values.append(clip.values)
                    owners.append(file)
                    content.append(clip.positions)
                    file.clips.append(Place.of(clip))
                    if len(values) == self.batch:
                        self._run(values, content, owners)
            except ClipError as error:
                file.error = " ".join(str(error).split())
            file.read = True
            yield from self._done(waiting)
        self._run(values, content, owners)
        yield from self._done(waiting)

    def _run(self, values: list[torch.Tensor], content: list[int], owners: list[_File]) -> None:
        if values:
            codes = self.model.codes(torch.stack(values), content).cpu().unbind(0)
            for owner, found in zip(owners, codes, strict=True):
                owner.codes.append(found)
        values.clear()
        content.clear()
        owners.clear()

    def _done(self, waiting: deque[_File]) -> Iterator[Found]:
        config = self.model.config
        while waiting and waiting[0].read and len(waiting[0].codes) == len(waiting[0].clips):
            file = waiting.popleft()
            if file.error is not None:
                yield Found(error=file.error)
            else:
                size = config.quantizer.codebook_size
                yield Found(CodeStream.from_windows(config.modality, size, file.clips, file.codes))


def webdataset_stage(
    model: BridleModel, *, batch: int = WINDOWS, on_error: Callable[[Sample, str], bool] | None = None
) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """A stage for ``webdataset.WebDataset(...).compose(webdataset_stage(model))``: samples of bytes in, codes added.

    Takes the member that the modality prefers (undecoded: put the stage before ``.decode()``), and replaces it by
    ``codes.npy`` ``[M, N]`` and ``codes.json`` (grid, seconds), as array and dict. Order is kept; windows are batched
    across samples, so a sample comes out a few samples later than it went in.

    Args:
        batch: windows in a batch. on_error: given the sample and the reason; true drops the sample, false raises. By
            default it raises.

    Raises:
        ClipError: while iterating, for a sample that cannot be read.
        ValueError: while iterating, for a sample without a member of the modality.
    """
    tokenizer = Tokenizer(model, batch)
    kind = code_type(model.config.quantizer.codebook_size)

    def stage(samples: Iterable[Sample]) -> Iterator[Sample]:
        waiting: deque[tuple[Sample, str]] = deque()

        def media() -> Iterator[bytes]:
            for sample in samples:
                name = next((name for name in model.modality.extensions if name in sample), None)
                if name is None:
                    kinds = ", ".join(model.modality.extensions)
                    raise MistakeError(f"sample '{sample.get('__key__')}': no member of {kinds} in {sorted(sample)}")
                waiting.append((sample, name))
                yield sample[name]

        for found in tokenizer(media()):
            sample, name = waiting.popleft()
            if found.stream is None:
                reason = found.error or "no codes"
                if on_error is None or not on_error(sample, reason):
                    raise ClipError(f"sample '{sample.get('__key__')}': {reason}")
                continue
            stream = found.stream
            about = {"grid": stream.grid, "duration_s": stream.duration_s}
            rest = {key: value for key, value in sample.items() if key != name}
            yield {**rest, "codes.npy": np.ascontiguousarray(stream.codes.T.numpy().astype(kind)), "codes.json": about}

    return stage
