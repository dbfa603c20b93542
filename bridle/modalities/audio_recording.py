"""An opened sound file, whichever library opened it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import soundfile

from bridle.modalities.audio_kinds import Kind
from bridle.modalities.clip import UndecodableError


@dataclass(frozen=True)
class Recording:
    """An opened sound file.

    rate: Hz. frames: samples per channel by the header; none where it says nothing reliable.
    blocks: call once, with a first sample (0 unless `seekable`), for an iterator of mono float32 ``[n]`` at `rate`,
        n > 0.
    """

    kind: Kind
    rate: int
    frames: int | None
    seekable: bool
    blocks: Callable[[int], Iterator[np.ndarray]]


def corrupt(kind: Kind, error: Exception) -> UndecodableError:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else getattr(error, "strerror", None)
    reason = " ".join((text or str(error)).split()).rstrip(".") or "unreadable"
    return UndecodableError(f"{kind.name}: corrupt or truncated ({reason}); replace the file")


def mono(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels of float32 ``[channels, n]``."""
    if len(samples) == 1:
        return np.ascontiguousarray(samples[0])
    mixed = np.zeros(samples.shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused right after
        for channel in samples:  # 30 times as fast as a sum over the short axis of interleaved samples
            mixed += channel
    return mixed / np.float32(len(samples))
