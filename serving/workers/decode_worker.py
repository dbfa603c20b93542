"""A decoding process: strangers' bytes in, clips out into shared memory. It may crash, hang or bloat: only it ends.

It has no network, writes no files, may take a stated amount of memory, and an alarm of the kernel ends it when one
clip takes too long, whatever the decoder is doing.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from bridle.modalities import build_modality
from bridle.modalities.clip import Clip, ClipError, Limits, Modality, TooLargeError, UndecodableError
from bridle.modalities.isolation import confine, leave_network
from serving.logs import take_over_logging
from serving.workers import wire
from serving.workers.arena import attach
from serving.workers.processes import receive_file, settle_in

PICTURE_WINDOWS = 16
"""Windows in a picture for people at most."""
PICTURE_HEIGHT = 160
"""Height of a film's frames in a picture for people."""


def main(sock: socket.socket) -> None:
    """Serves jobs until the service is gone. The first message is the configuration."""
    settle_in("bridle-decode")
    memory = attach(receive_file(sock))
    config, _ = wire.receive(sock)
    take_over_logging(config["log_level"])
    os.chdir("/")
    torch.set_num_threads(1)
    settings = config["settings"] | ({"isolate": False} if "isolate" in config["settings"] else {})  # we are isolated
    modality = build_modality(config["modality"], settings, Limits.model_validate(config["limits"]))
    offline = leave_network()
    confine(config["memory_bytes"])
    wire.send(sock, {"ready": True, "offline": offline})
    slots = np.frombuffer(memory, np.float32).reshape(-1, config["slot_bytes"] // 4)
    worker = _Worker(sock, modality, slots, config["seconds"])
    try:
        while True:
            header, data = wire.receive(sock)
            if "op" in header:  # what else arrives here was meant for a job that has just ended
                worker.job(header, bytes(data))
    except (EOFError, ConnectionError):
        os._exit(0)


class _Worker:
    def __init__(self, sock: socket.socket, modality: Modality, slots: np.ndarray, seconds: float) -> None:
        self._sock = sock
        self._modality = modality
        self._slots = slots
        self._seconds = seconds

    def job(self, header: dict[str, Any], data: bytes) -> None:
        self._alarm(self._seconds)
        payload = b""
        try:
            if header["op"] == "picture":
                answer, payload = _picture(self._modality, data)
            else:
                self._windows(data, header["slot"])
                answer = {"done": True}
        except (EOFError, ConnectionError):
            raise
        except ClipError as error:
            answer = {"error": type(error).__name__, "message": str(error)[:1000]}
        except MemoryError:
            told = "decoding needs more memory than decode_memory_mb; send a smaller file"
            answer = {"error": TooLargeError.__name__, "message": told}
        except Exception as error:  # not the file's: a decoder says what is wrong with a file by a ClipError
            told = f"{type(error).__name__}: {error}"[:1000]
            answer = {"error": "fault", "message": told, "traceback": traceback.format_exc()[-8000:]}
        self._alarm(0)
        wire.send(self._sock, answer, payload)

    def _windows(self, data: bytes, slot: int | None) -> None:
        for clip in self._modality.windows(data):
            if slot is None:
                self._alarm(0)  # waiting for a place is not the file's fault
                wire.send(self._sock, {"need": True})
                answer, _ = wire.receive(self._sock)
                if "slot" not in answer:
                    return
                slot = int(answer["slot"])
                self._alarm(self._seconds)
            values = clip.values.numpy().reshape(-1)
            if not np.isfinite(values).all():
                raise UndecodableError("the content has values that are not finite")
            self._slots[slot, : len(values)] = values
            wire.send(
                self._sock,
                {"slot": slot, "valid": clip.valid, "start_s": clip.start_s, "duration_s": clip.duration_s},
            )
            slot = None

    @staticmethod
    def _alarm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _picture(modality: Modality, data: bytes) -> tuple[dict[str, Any], bytes]:
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
    return {"done": True, "frames": frames or 1, "steps": steps}, file.getvalue()


def _first(clips: Iterator[Clip], count: int) -> Iterator[Clip]:
    for _, clip in zip(range(count), clips, strict=False):
        yield clip
