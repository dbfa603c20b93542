"""Batches through a model: each is begun, and finished in the order of their beginnings.

On CUDA `begin` only tells the device what to do: clips are copied from pinned memory on a stream of copies, the forward
pass waits for them there, and its answer is copied into pinned memory. So the next batch is received, gathered and
copied while the device computes. On a CPU `begin` computes.
"""

from __future__ import annotations

import math
import time
import traceback
from queue import SimpleQueue
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bridle.classifier import Classifier
from bridle.model import BridleModel
from bridle.processes.framing import Buffer
from bridle.processes.messages import Dequantize, Fault, Forward, Result, fault_of


class _Batch(NamedTuple):
    """found: on the host, and whole once `done` says so; done: none where it is from the beginning."""

    message: Forward | Dequantize
    began: float
    found: Tensor | Fault
    done: torch.cuda.Event | None = None


class Pipeline:
    """The batches of one model that are under way. One thread may begin them while another finishes them.

    Args:
        model: on the device where batches run.
        slots: float32 ``[slots, n]`` in the host's memory; a clip stands at the beginning of its row, and its
            embeddings are written into the same place when its batch is finished.
        shape: of one clip, ``[C, *S]``; max_batch: clips in a batch at most.
    """

    def __init__(self, model: BridleModel | Classifier, slots: Tensor, shape: list[int], max_batch: int) -> None:
        self._model = model
        self._shape = shape
        self._max_batch = max_batch
        self._clips = slots[:, : math.prod(shape)]
        self._rows = slots.numpy()
        self._device = model.device
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._under_way: SimpleQueue[_Batch] = SimpleQueue()
        self._last_end = 0.0

    @property
    def at_once(self) -> bool:
        """Whether a batch is computed when it has begun."""
        return self._copies is None

    def begin(self, message: Forward | Dequantize, payload: bytearray) -> None:
        """Begins a batch; what fails is told when it is finished.

        Raises:
            torch.AcceleratorError: the device is of no more use to this process.
        """
        began = time.perf_counter()
        try:
            self._settle()
            found = self._found(message, payload)
            done = None
            if self._copies is not None:
                found = found.to("cpu", non_blocking=True)  # which torch pins
                done = torch.cuda.Event(blocking=True)  # who waits sleeps: the cores are the decoders'
                done.record()
            batch = _Batch(message, began, found, done)
        except Exception as error:
            batch = _Batch(message, began, _fault(error))
        self._under_way.put(batch)

    def finish(self) -> tuple[Result | Fault, Buffer]:
        """Waits for the oldest batch, and gives its answer; a failure is one too, for it concerns this batch only.

        Its seconds are the host's, from its beginning, or from the end of the batch before it where that was later: so
        long has it kept the device.

        Raises:
            torch.AcceleratorError: as `begin`.
        """
        batch = self._under_way.get()
        try:
            if isinstance(batch.found, Fault):
                return batch.found, b""
            if batch.done is not None:
                self._settle()
                batch.done.synchronize()
            return self._answer(batch, batch.found)
        except Exception as error:
            return _fault(error), b""
        finally:
            self._last_end = time.perf_counter()

    def _settle(self) -> None:
        if self._copies is not None:
            torch.cuda.set_device(self._device)  # of this thread: else it would take memory on the first one

    def _found(self, message: Forward | Dequantize, payload: bytearray) -> Tensor:
        """What the model makes of a batch, on its device: codes are int32, all else float32."""
        if self._copies is None:
            torch.set_num_threads(message.threads)
        if isinstance(message, Dequantize):
            if isinstance(self._model, Classifier):
                raise ValueError("a classifier has no codes")
            return self._model.dequantize(torch.frombuffer(payload, dtype=torch.int64).view(message.shape))
        clips = self._gathered(message.slots).view(-1, *self._shape)
        if isinstance(self._model, Classifier):
            return self._model.probabilities(clips, message.valid)
        if message.operation == "embed":
            return self._model.embed(clips, message.valid)
        return self._model.codes(clips, message.valid).to(torch.int32)

    def _gathered(self, slots: list[int]) -> Tensor:
        """The clips of a batch on the device, float32 ``[B, C * prod(S)]``."""
        if self._copies is None:
            return self._clips[slots]
        # Always of one size: torch keeps pinned memory, and hands it out again when what was copied from it is there.
        pinned = torch.empty(self._max_batch, self._clips.shape[1], pin_memory=True)[: len(slots)]
        torch.index_select(self._clips, 0, torch.tensor(slots), out=pinned)
        with torch.cuda.stream(self._copies):
            clips = pinned.to(self._device, non_blocking=True)
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._copies)
        clips.record_stream(here)  # else its memory could be given away while it is still read
        return clips

    def _answer(self, batch: _Batch, found: Tensor) -> tuple[Result, Buffer]:
        array = np.ascontiguousarray(found.numpy())
        kind: Literal["int32", "float32"] = "int32" if array.dtype == np.int32 else "float32"
        payload: Buffer = array.reshape(-1).view(np.uint8).data
        if isinstance(batch.message, Forward) and batch.message.operation == "embed":
            flat = array.reshape(len(array), -1)
            self._rows[batch.message.slots, : flat.shape[1]] = flat
            payload = b""
        return Result(list(array.shape), kind, time.perf_counter() - max(batch.began, self._last_end)), payload


def _fault(error: Exception) -> Fault:
    """What to tell of an error that concerns one batch. Raises it where it concerns all that follow."""
    if isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error):
        raise error  # CUDA gives the same error for whatever comes next; another process has a device again
    return fault_of(error, traceback.format_exc())
