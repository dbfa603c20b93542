"""A model process: one model on one device. It reads clips from shared memory and answers with raw arrays."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bridle.classifier import Classifier, load_classifier
from bridle.folder_config import is_classifier
from bridle.model import BridleModel
from bridle.model_folder import load
from bridle.modeling.encoder import Encoder
from bridle.processes.framing import Buffer, Line
from bridle.processes.memory import Shared
from bridle.processes.messages import (
    VERSION,
    BeginModel,
    Dequantize,
    Fault,
    Forward,
    Message,
    ModelReady,
    Result,
    fault_of,
)
from serving.logs import flush, take_over_logging


def main(line: Line, memory: Shared) -> None:
    """Loads, warms up, then serves batches until the service is gone. The first message is the configuration."""
    begin, _ = line.receive()
    take_over_logging(begin.log_level)
    try:
        worker = _Worker(begin, memory)
        hello = worker.warm_up()
    except (ValueError, OSError, RuntimeError) as error:  # the folder or the device, not a request
        line.send(Fault(" ".join(str(error).split())[:2000], "", memory=False))
        return
    try:
        line.send(hello)
        while True:
            line.send(*worker.answer(*line.receive()))
    except (EOFError, ConnectionError):
        flush()
        os._exit(0)


class _Worker:
    def __init__(self, begin: BeginModel, memory: Shared) -> None:
        self._on_cpu = torch.device(begin.device).type == "cpu"
        self._thread_counts = begin.threads
        self._set_threads(self._thread_counts[0])
        folder = Path(begin.folder)
        self._model: BridleModel | Classifier
        if is_classifier(folder):
            self._model = load_classifier(folder, device=begin.device, dtype=begin.dtype)
        else:
            self._model = load(folder, device=begin.device, dtype=begin.dtype)
        self._shape = begin.shape
        slots = torch.frombuffer(memory, dtype=torch.float32)
        self._whole_slots = slots.view(-1, begin.slot_bytes // 4)
        self._slots = self._whole_slots[:, : int(np.prod(self._shape))]
        self._max_batch = begin.max_batch
        if begin.compile:
            self._compile()

    def _compile(self) -> None:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that stays for good
        tqdm.set_lock(threading.RLock())  # torch's tracer has tqdm take a semaphore, reported as leaked at the end
        for module in self._modules():
            if isinstance(module, Encoder):
                module.compile(dynamic=True)

    def _modules(self) -> Iterator[nn.Module]:
        if isinstance(self._model, Classifier):
            return self._model.module.modules()
        return chain(self._model.encoder.modules(), self._model.tokenizer.modules())

    def _warm_up_classifier(self, classifier: Classifier, batches: list[Tensor]) -> ModelReady:
        positions = classifier.module.encoder.patch.count(batches[0])
        for threads in self._thread_counts:
            self._set_threads(threads)
            for clips in batches:
                for valid in (positions, positions - 1):
                    classifier.probabilities(clips, [valid] * len(clips))
        return ModelReady(VERSION, classifier.info, codes_depend_on_batch=False)

    def warm_up(self) -> ModelReady:
        """Runs the smallest and largest batch at each number of threads, and compares a clip's codes."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn([self._max_batch, self._slots.shape[1]], generator=generator)
        # Rows are chosen as for a request: torch.compile guards the tensor that a view is made from, too.
        clips = self._clips(rows, list(range(len(rows))))
        singles = [self._clips(rows, [i]) for i in range(min(2, len(rows)))]
        if isinstance(self._model, Classifier):
            return self._warm_up_classifier(self._model, [clips, singles[0]])
        found = []
        for threads in self._thread_counts:
            self._set_threads(threads)
            alone = torch.cat([self._model.codes(clip) for clip in singles])
            found += [alone, self._model.codes(clips)[: len(alone)]]
            self._model.embed(clips)
            self._model.embed(singles[0])
            for padded in (clips, singles[0]):  # with padding attention has a mask, which is another graph
                valid = [alone.shape[1] - 1] * len(padded)
                self._model.codes(padded, valid)
                self._model.embed(padded, valid)
        same = all(torch.equal(found[0], codes) for codes in found)
        return ModelReady(VERSION, self._model.info, codes_depend_on_batch=not same)

    def _clips(self, rows: Tensor, chosen: list[int]) -> Tensor:
        return rows[chosen].view(-1, *self._shape)

    def _set_threads(self, threads: int) -> None:
        if self._on_cpu:
            torch.set_num_threads(threads)

    def answer(self, message: Forward | Dequantize, payload: bytearray) -> tuple[Message, Buffer]:
        """One batch; a failure is an answer too, for it concerns this batch only."""
        began = time.perf_counter()
        try:
            found = self._run(message, payload)
            if isinstance(message, Forward) and message.operation == "embed":
                self._whole_slots[message.slots, : found[0].numel()] = found.flatten(1).cpu()
                return Result(list(found.shape), "float32", time.perf_counter() - began), b""
            array = np.ascontiguousarray(found.cpu().numpy())
        except Exception as error:  # of this batch, whatever it is: the process goes on
            return fault_of(error, traceback.format_exc()), b""
        kind: Literal["int32", "float32"] = "int32" if array.dtype == np.int32 else "float32"
        result = Result(list(array.shape), kind, time.perf_counter() - began)
        return result, array.reshape(-1).view(np.uint8).data

    def _run(self, message: Forward | Dequantize, payload: bytearray) -> Tensor:
        self._set_threads(message.threads)
        if isinstance(self._model, Classifier):
            if isinstance(message, Dequantize):
                raise ValueError("a classifier has no codes")
            return self._model.probabilities(self._clips(self._slots, message.slots), message.valid)
        if isinstance(message, Dequantize):
            return self._model.dequantize(torch.frombuffer(payload, dtype=torch.int64).view(message.shape))
        clips = self._clips(self._slots, message.slots)
        if message.operation == "embed":
            return self._model.embed(clips, message.valid)
        return self._model.codes(clips, message.valid).to(torch.int32)
