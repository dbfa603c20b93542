"""A decoding process: strangers' bytes in, clips out into shared memory. It may crash, hang or bloat: only it ends.

It has no network, writes no files, may take a stated amount of memory, and an alarm of the kernel ends it when one
clip takes too long, whatever the decoder is doing.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from bridle.modalities import build_modality
from bridle.modalities.clip import Clip, ClipError, Limits, Modality, TooLargeError, UndecodableError
from bridle.processes.confinement import confine, leave_network, time_limit
from bridle.processes.framing import Line
from bridle.processes.memory import Shared
from bridle.processes.messages import (
    VERSION,
    BeginDecoder,
    Decode,
    Decoded,
    Draw,
    Drawn,
    End,
    Message,
    Need,
    Ready,
    Refused,
    Slot,
    fault_of,
)
from serving.logs import flush, take_over_logging

PICTURE_WINDOWS = 16
"""Windows in a picture for people at most."""
PICTURE_HEIGHT = 160
"""Height of a film's frames in a picture for people."""


def main(line: Line, memory: Shared) -> None:
    """Serves jobs until the service is gone. The first message is the configuration."""
    begin, _ = line.receive()
    take_over_logging(begin.log_level)
    os.chdir("/")
    torch.set_num_threads(1)
    settings = begin.settings | ({"isolate": False} if "isolate" in begin.settings else {})  # we are isolated
    modality = build_modality(begin.modality, settings, Limits.model_validate(begin.limits))
    offline = leave_network()
    confine(begin.memory_bytes)
    slots = np.frombuffer(memory, np.float32).reshape(-1, begin.slot_bytes // 4)
    worker = _Worker(line, modality, slots, begin)
    try:
        line.send(Ready(VERSION, offline))
        while True:
            message, data = line.receive()
            if isinstance(message, Decode | Draw):  # what else arrives here was meant for a job that has just ended
                worker.job(message, bytes(data))
    except (EOFError, ConnectionError):
        flush()
        os._exit(0)


class _Worker:
    def __init__(self, line: Line, modality: Modality, slots: np.ndarray, begin: BeginDecoder) -> None:
        self._line = line
        self._modality = modality
        self._slots = slots
        self._limits = (begin.seconds, begin.cpu_seconds)

    def job(self, message: Decode | Draw, data: bytes) -> None:
        time_limit(*self._limits)
        payload = b""
        last: Message | None = End()
        try:
            if isinstance(message, Draw):
                last, payload = _picture(self._modality, data)
            else:
                last = self._windows(data, message.slot)
        except ClipError as error:
            last = Refused(type(error).__name__, str(error)[:1000])
        except MemoryError:
            told = "decoding needs more memory than decode_memory_mb; send a smaller file"
            last = Refused(TooLargeError.__name__, told)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # not the file's: a decoder says what is wrong with a file by a ClipError
            last = fault_of(error, traceback.format_exc())
        time_limit(0)
        if last is not None:
            self._line.send(last, payload)

    def _windows(self, data: bytes, first: int) -> Message | None:
        """Sends the file's clips; what is still to be said, if anything."""
        slot: int | None = first
        single = "time" not in self._modality.axes  # a picture is one clip: its message is the last one
        for clip in self._modality.windows(data):
            if slot is None:
                time_limit(0)  # waiting for a place is not the file's fault
                self._line.send(Need())
                answer, _ = self._line.receive()
                if not isinstance(answer, Slot):
                    return End()
                slot = answer.slot
                time_limit(*self._limits)
            values = clip.values.numpy().reshape(-1)
            if not np.isfinite(values).all():
                raise UndecodableError("the content has values that are not finite")
            self._slots[slot, : len(values)] = values
            if single:
                time_limit(0)
            self._line.send(Decoded(slot, clip.valid, clip.start_s, clip.duration_s, last=single))
            if single:
                return None
            slot = None
        return End()


def _picture(modality: Modality, data: bytes) -> tuple[Drawn, bytes]:
    """The first windows for people: one PNG, windows (and the frames of a film) side by side."""
    strips: list[np.ndarray] = []
    frames = steps = 0
    for clip in _first(modality.windows(data), PICTURE_WINDOWS):
        picture = modality.picture(clip)
        steps += clip.valid
        if picture.ndim == 4:
            kept = picture[: max(1, round(len(picture) * clip.valid / clip.grid[modality.axes[0]]))]
            step = max(1, kept.shape[1] // PICTURE_HEIGHT)
            frames += len(kept)
            strips += [frame[::step, ::step] for frame in kept]
        elif modality.positions_per_second is not None:
            strips.append(picture[:, : picture.shape[1] * clip.valid // clip.grid[modality.axes[0]]])
        else:
            strips.append(picture)
    strip = np.concatenate(strips, axis=1)
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "PNG", compress_level=1)
    return Drawn(frames or 1, steps), file.getvalue()


def _first(clips: Iterator[Clip], count: int) -> Iterator[Clip]:
    for _, clip in zip(range(count), clips, strict=False):
        yield clip
