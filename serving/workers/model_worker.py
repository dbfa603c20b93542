"""A model process: one model on one device. It reads clips from shared memory and answers with raw arrays."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bridle.classifier import Classifier, load_classifier
from bridle.folder_config import is_classifier
from bridle.model import BridleModel
from bridle.model_folder import load
from bridle.modeling.encoder import Encoder
from bridle.processes.framing import Line
from bridle.processes.memory import Shared
from bridle.processes.messages import VERSION, BeginModel, Fault, Forward, ModelReady, array_of
from serving.logs import flush, log, take_over_logging
from serving.workers.pipeline import Pipeline

Operation = Literal["codes", "embed", "classify"]


def main(line: Line, memory: Shared) -> None:
    """Loads, warms up, then serves batches until the service is gone. The first message is the configuration."""
    begin, _ = line.receive()
    take_over_logging(begin.log_level)
    try:
        model = _loaded(begin)
        slots = torch.frombuffer(memory, dtype=torch.float32).view(-1, begin.slot_bytes // 4)
        pipeline = Pipeline(model, slots, begin.shape, begin.max_batch)
        hello = _warm_up(model, begin)
    except (ValueError, OSError, RuntimeError) as error:  # the folder or the device, not a request
        line.send(Fault(" ".join(str(error).split())[:2000], "", memory=False))
        return
    try:
        line.send(hello)
        serve(line, pipeline)
    except Exception as error:
        _leave(error)


def serve(line: Line, pipeline: Pipeline) -> None:
    """Begins batches as they come, while a thread waits for the device to finish them. Where `begin` computes there is
    nothing to wait for, and a thread would be one more to wake.

    Raises:
        EOFError, ConnectionError: the service is gone.
    """
    if not pipeline.at_once:
        threading.Thread(target=_answer_all, args=(line, pipeline), daemon=True).start()
    while True:
        pipeline.begin(*line.receive())
        if pipeline.at_once:
            line.send(*pipeline.finish())


def _answer_all(line: Line, pipeline: Pipeline) -> None:
    try:
        while True:
            line.send(*pipeline.finish())
    except Exception as error:
        _leave(error)


def _leave(error: Exception) -> NoReturn:
    """Ends the process, whichever thread cannot go on."""
    gone = isinstance(error, EOFError | ConnectionError)
    if not gone:
        log("error", "a model process cannot go on", error=repr(error))
    flush()
    os._exit(0 if gone else 1)


def _loaded(begin: BeginModel) -> BridleModel | Classifier:
    folder = Path(begin.folder)
    if torch.device(begin.device).type == "cpu":
        torch.set_num_threads(begin.threads[0])
    model: BridleModel | Classifier
    if is_classifier(folder):
        model = load_classifier(folder, device=begin.device, dtype=begin.dtype)
    else:
        model = load(folder, device=begin.device, dtype=begin.dtype)
    if begin.compile:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that stays for good
        tqdm.set_lock(threading.RLock())  # torch's tracer has tqdm take a semaphore, reported as leaked at the end
        for module in _modules(model):
            if isinstance(module, Encoder):
                module.compile(dynamic=True)
    return model


def _modules(model: BridleModel | Classifier) -> Iterator[nn.Module]:
    if isinstance(model, Classifier):
        return model.module.modules()
    return chain(model.encoder.modules(), model.tokenizer.modules())


def _warm_up(model: BridleModel | Classifier, begin: BeginModel) -> ModelReady:
    """Runs the smallest and largest batch at each number of threads, with padding (then attention has a mask, which is
    another graph) and without, and compares a clip's codes. Batches go the same way as in service, in slots of ours."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randn([begin.max_batch, begin.slot_bytes // 4], generator=generator)
    pipeline = Pipeline(model, slots, begin.shape, begin.max_batch)
    encoder = model.module.encoder if isinstance(model, Classifier) else model.encoder
    positions = encoder.patch.count(torch.empty(1, *begin.shape))
    few, every = [[slot] for slot in range(min(2, begin.max_batch))], list(range(begin.max_batch))

    def run(operation: Operation, threads: int, batches: list[list[int]], valid: int) -> list[np.ndarray]:
        return _answers(pipeline, [Forward(operation, threads, slots, [valid] * len(slots)) for slots in batches])

    if isinstance(model, Classifier):
        for threads, valid in product(begin.threads, (positions, positions - 1)):
            run("classify", threads, [every, few[0]], valid)
        return ModelReady(VERSION, model.info, codes_depend_on_batch=False)
    found = []
    for threads in begin.threads:
        *alone, together = run("codes", threads, [*few, every], positions)
        found += [np.concatenate(alone), together[: len(few)]]
        run("codes", threads, [every, few[0]], positions - 1)
    for threads, valid in product(begin.threads, (positions, positions - 1)):
        run("embed", threads, [every, few[0]], valid)  # last, for embeddings take their clips' place
    same = all(np.array_equal(found[0], codes) for codes in found)
    return ModelReady(VERSION, model.info, codes_depend_on_batch=not same)


def _answers(pipeline: Pipeline, batches: list[Forward]) -> list[np.ndarray]:
    """What comes of batches, all of them under way at once, so that torch has pinned memory for as many."""
    for batch in batches:
        pipeline.begin(batch, bytearray())
    found = []
    for answer, payload in [pipeline.finish() for _ in batches]:
        if isinstance(answer, Fault):
            raise RuntimeError(answer.message)
        if payload:
            found.append(array_of(answer, bytes(payload)))
    return found
