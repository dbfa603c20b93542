"""A model process: one model on one device. It reads clips from shared memory and answers with raw arrays."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bridle.model_folder import BridleModel, load
from bridle.modeling.encoder import Encoder
from serving.logs import take_over_logging
from serving.workers import wire
from serving.workers.arena import attach
from serving.workers.processes import receive_file, settle_in


def main(sock: socket.socket) -> None:
    """Loads, warms up, then serves batches until the service is gone. The first message is the configuration."""
    settle_in("bridle-model")
    memory = attach(receive_file(sock))
    config, _ = wire.receive(sock)
    take_over_logging(config["log_level"])
    try:
        worker = _Worker(config, memory)
        hello = worker.warm_up()
    except (ValueError, OSError, RuntimeError) as error:
        wire.send(sock, {"error": " ".join(str(error).split())[:2000]})
        return
    wire.send(sock, hello)
    try:
        while True:
            header, payload = wire.receive(sock)
            wire.send(sock, *worker.answer(header, payload))
    except (EOFError, ConnectionError):
        os._exit(0)


class _Worker:
    def __init__(self, config: dict[str, Any], memory: Any) -> None:
        self._on_cpu = torch.device(config["device"]).type == "cpu"
        self._thread_counts: list[int] = config["threads"]
        self._set_threads(self._thread_counts[0])
        self._model: BridleModel = load(config["folder"], device=config["device"], dtype=config["dtype"])
        self._shape: list[int] = config["shape"]
        slots = torch.frombuffer(memory, dtype=torch.float32)
        self._slots = slots.view(-1, config["slot_bytes"] // 4)[:, : int(np.prod(self._shape))]
        self._max_batch: int = config["max_batch"]
        if config["compile"]:
            self._compile()

    def _compile(self) -> None:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that stays for good
        tqdm.set_lock(threading.RLock())  # torch's tracer has tqdm take a semaphore, reported as leaked at the end
        for module in (*self._model.encoder.modules(), *self._model.tokenizer.modules()):
            if isinstance(module, Encoder):
                module.compile(dynamic=True)

    def warm_up(self) -> dict[str, Any]:
        """Runs the smallest and largest batch at each number of threads, and compares a clip's codes."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn([self._max_batch, self._slots.shape[1]], generator=generator)
        # Rows are chosen as for a request: torch.compile guards the tensor that a view is made from, too.
        clips = self._clips(rows, list(range(len(rows))))
        singles = [self._clips(rows, [i]) for i in range(min(2, len(rows)))]
        found = []
        for threads in self._thread_counts:
            self._set_threads(threads)
            alone = torch.cat([self._model.codes(clip) for clip in singles])
            found += [alone, self._model.codes(clips)[: len(alone)]]
            self._model.embed(clips)
            self._model.embed(singles[0])
        return {
            "ready": True,
            "info": self._model.info,
            "positions": found[0].shape[1],
            "codes_depend_on_batch": not all(torch.equal(found[0], codes) for codes in found),
        }

    def _clips(self, rows: Tensor, chosen: list[int]) -> Tensor:
        return rows[chosen].view(-1, *self._shape)

    def _set_threads(self, threads: int) -> None:
        if self._on_cpu:
            torch.set_num_threads(threads)

    def answer(self, header: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], memoryview]:
        """One batch; a failure is an answer too, for it concerns this batch only."""
        began = time.perf_counter()
        try:
            array = self._run(header, payload)
        except Exception as error:  # of this batch, whatever it is: the process goes on
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            told = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
            return {"error": told, "memory": memory, "traceback": traceback.format_exc()[-8000:]}, memoryview(b"")
        return {"shape": array.shape, "seconds": time.perf_counter() - began}, array.reshape(-1).view(np.uint8).data

    def _run(self, header: dict[str, Any], payload: bytearray) -> np.ndarray:
        self._set_threads(header["threads"])
        if header["op"] == "dequantize":
            codes = torch.frombuffer(payload, dtype=torch.int64).view(header["shape"])
            return _plain(self._model.dequantize(codes))
        clips = self._clips(self._slots, header["slots"])
        if header["op"] == "embed":
            return _plain(self._model.embed(clips))
        return _plain(self._model.codes(clips).to(torch.int32))


def _plain(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())
