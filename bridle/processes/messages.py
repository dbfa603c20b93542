"""Every message between this program and its child processes, in one place.

A message is one of these structs and, for those that say so, a payload of raw bytes. A struct is decoded against the
types that its direction allows, so that what a process taken over by a file says is checked before anyone reads it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

VERSION = 4
"""To be raised with any change below: a program and a child of another version on disk refuse each other."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all."""


class Begin(Message, frozen=True):
    """To a child that decodes for a program that waits. target: ``module:function``; imports: modules it needs."""

    version: int
    target: str
    imports: list[str]
    seconds: float
    memory_bytes: int


class BeginDecoder(Message, frozen=True):
    """To a decoder of the service. seconds, cpu_seconds: for one clip; slot_bytes: of one clip in shared memory."""

    version: int
    modality: str
    settings: dict[str, Any]
    limits: dict[str, Any]
    memory_bytes: int
    seconds: float
    cpu_seconds: float
    slot_bytes: int
    log_level: str


class BeginModel(Message, frozen=True):
    """To a model process. threads: the numbers of threads that a batch may get; shape: of one clip."""

    version: int
    folder: str
    device: str
    dtype: Literal["float32", "bfloat16"]
    compile: bool
    threads: list[int]
    max_batch: int
    shape: list[int]
    slot_bytes: int
    log_level: str


class Ready(Message, frozen=True):
    """From a child that has given up its rights. offline: it has no network."""

    version: int
    offline: bool


class ModelReady(Message, frozen=True):
    """From a model process that is warm. info: `BridleModel.info`, or `Classifier.info`."""

    version: int
    info: dict[str, Any]
    codes_depend_on_batch: bool


class Ask(Message, frozen=True):
    """A request for the target, plain data; the payload is the file."""

    request: dict[str, Any]


class Answer(Message, frozen=True):
    """One answer of the target; the payload is the array, of this shape and of numpy's name for the dtype."""

    header: dict[str, Any]
    shape: list[int]
    dtype: str


class Decode(Message, frozen=True):
    """A file to decode into clips, the first of which goes into `slot`; the payload is the file."""

    slot: int


class Draw(Message, frozen=True):
    """A file to draw for people; the payload is the file."""


class Need(Message, frozen=True):
    """From a decoder that has a clip and no slot for it."""


class Slot(Message, frozen=True):
    """A slot for it."""

    slot: int


class Cancel(Message, frozen=True):
    """Nobody waits for the job any more."""


class Decoded(Message, frozen=True):
    """A clip stands in `slot`. valid: patches along the first axis with content; seconds, or none without time; last:
    it is the file's only one, and no `End` follows."""

    slot: int
    valid: int
    start_s: float | None
    duration_s: float | None
    last: bool = False


class Drawn(Message, frozen=True):
    """The payload is a PNG. frames: of a film, else 1; steps: patches along the first axis."""

    frames: int
    steps: int


class End(Message, frozen=True):
    """All answers of a job have been sent."""


class Refused(Message, frozen=True):
    """The input is at fault. kind: name of the `RefusedError`."""

    kind: str
    message: str


class Fault(Message, frozen=True):
    """Something failed that nobody expected. memory: for lack of memory."""

    message: str
    traceback: str
    memory: bool


class Forward(Message, frozen=True):
    """A batch: the clips in these slots, with so many threads on a CPU; valid: positions of each that are content."""

    operation: Literal["codes", "embed", "classify"]
    threads: int
    slots: list[int]
    valid: list[int]


class Dequantize(Message, frozen=True):
    """Codes to latents; the payload is int64 of this shape."""

    threads: int
    shape: list[int]


class Result(Message, frozen=True):
    """An array, int32 codes or float32: the payload, or (embeddings) each clip's part in the clip's slot, where there
    is no payload. seconds: that the batch took."""

    shape: list[int]
    dtype: Literal["int32", "float32"]
    seconds: float


ToChild = Begin | Ask | Cancel
FromChild = Ready | Answer | End | Refused | Fault
ToDecoder = BeginDecoder | Decode | Draw | Slot | Cancel
FromDecoder = Ready | Need | Decoded | Drawn | End | Refused | Fault
ToModel = BeginModel | Forward | Dequantize
FromModel = ModelReady | Result | Fault


def fault_of(error: BaseException, traceback: str) -> Fault:
    """What to tell of an error that nobody expected."""
    short = "out of memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
    told = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
    return Fault(told, traceback[-8000:], memory=short or isinstance(error, MemoryError))


def array_of(answer: Answer | Result, payload: bytes | bytearray) -> np.ndarray:
    """The array that came with an answer.

    Raises:
        ValueError, TypeError: the payload is none of that shape and dtype.
    """
    dtype = np.dtype(answer.dtype)
    if dtype.kind not in "uif":
        raise ValueError(f"an array of {dtype}")
    return np.frombuffer(payload, dtype).reshape(answer.shape)
