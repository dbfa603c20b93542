"""A model process: one model on one device. It reads clips from shared memory and answers with raw arrays."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridle.model_folder import BridleModel, load
from serving import wire
from serving.arena import attach
from serving.processes import receive_file, settle_in


def main(sock: socket.socket) -> None:
    """Loads, warms up, then serves batches until the service is gone. The first message is the configuration."""
    settle_in("bridle-model")
    memory = attach(receive_file(sock))
    config, _ = wire.receive(sock)
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
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        self._model: BridleModel = load(config["folder"], device=config["device"], dtype=config["dtype"])
        self._shape: list[int] = config["shape"]
        slots = torch.frombuffer(memory, dtype=torch.float32)
        self._slots = slots.view(-1, config["slot_bytes"] // 4)[:, : int(np.prod(self._shape))]
        self._max_batch: int = config["max_batch"]
        if config["compile"]:
            self._model.encoder.compile()
            self._model.tokenizer.compile()

    def warm_up(self) -> dict[str, Any]:
        """Runs every size a batch can have at its ends, and looks whether a clip's codes depend on its company."""
        generator = torch.Generator().manual_seed(0)
        clips = torch.randn([self._max_batch, *self._shape], generator=generator)
        together = self._model.codes(clips)
        alone = torch.cat([self._model.codes(clip) for clip in clips[:2].split(1)])
        self._model.embed(clips)
        self._model.embed(clips[:1])
        return {
            "ready": True,
            "info": self._model.info,
            "positions": together.shape[1],
            "codes_depend_on_batch": not torch.equal(alone, together[:2]),
        }

    def answer(self, header: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], memoryview]:
        """One batch; a failure is an answer too, for it concerns this batch only."""
        began = time.perf_counter()
        try:
            array = self._run(header, payload)
        except (ValueError, RuntimeError) as error:
            kind = "wrong" if isinstance(error, ValueError) else "error"
            return {kind: " ".join(str(error).split())[:2000]}, memoryview(b"")
        return {"shape": array.shape, "seconds": time.perf_counter() - began}, array.reshape(-1).view(np.uint8).data

    def _run(self, header: dict[str, Any], payload: bytearray) -> np.ndarray:
        if header["op"] == "dequantize":
            codes = torch.frombuffer(payload, dtype=torch.int64).view(header["shape"])
            return _plain(self._model.dequantize(codes))
        clips = self._slots[header["slots"]].view(-1, *self._shape)
        if header["op"] == "embed":
            return _plain(self._model.embed(clips))
        return _plain(self._model.codes(clips).to(torch.int32))


def _plain(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())
