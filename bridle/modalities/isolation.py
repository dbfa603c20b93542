"""Decoding in a child process (see `bridle.processes.child`): its failures become errors of the clip."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any

from bridle.modalities.clip import Clip, ClipError, Limits, Modality, TooLargeError, UndecodableError, WrongKindError
from bridle.processes.child import Found as Answer
from bridle.processes.child import answers_of, close_idle
from bridle.processes.errors import (
    ChildError,
    ChildFaultError,
    ForeignRefusalError,
    ProcessGoneError,
    ProtocolError,
    SlowError,
)

__all__ = ["Answer", "ChildError", "clip_answers", "clip_error", "close_idle", "isolated", "isolated_windows"]

_CLIP_ANSWERS = "bridle.modalities.isolation:clip_answers"
_KINDS = {kind.__name__: kind for kind in (UndecodableError, WrongKindError, TooLargeError)}


def clip_error(kind: str, message: str) -> ClipError:
    """The error of a clip that a child refused: the one place where its name becomes a class again."""
    return _KINDS.get(kind, UndecodableError)(message[:2000])


def isolated(
    target: str,
    data: bytes,
    request: Mapping[str, Any],
    *,
    seconds: float,
    memory_bytes: int,
    imports: tuple[str, ...] = (),
) -> Iterator[Answer]:
    """What ``module:function`` yields for the data and the request, in a child of this process.

    Raises:
        ClipError: what the target raised; UndecodableError where it crashed or failed, TooLargeError where it took too
            long or too much memory. ChildError: a child cannot start here.
    """
    bounds: dict[str, Any] = {"seconds": seconds, "memory_bytes": memory_bytes, "imports": imports}
    try:
        yield from answers_of(target, data, request, **bounds)
    except SlowError:
        told = f"decoding took longer than the limit of {seconds:g} s for one clip; send a smaller file"
        raise TooLargeError(told) from None
    except ChildFaultError as error:
        if error.memory:
            raise TooLargeError("decoding needs more memory than the limit on its process") from None
        raise UndecodableError(f"the decoder failed ({error})") from None
    except ProtocolError:
        raise UndecodableError("the decoding process answered nonsense; the file is refused") from None
    except ProcessGoneError as error:
        raise UndecodableError(f"the decoder crashed ({_how(error.code)}); the file is corrupt") from None
    except ForeignRefusalError as error:
        raise clip_error(error.kind, str(error)) from None


def _how(code: int | None) -> str:
    if code is None:
        return "it hung up without an answer"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def isolated_windows(modality: Modality, data: bytes, *, seconds: float, memory_bytes: int) -> Iterator[Clip]:
    """`modality.windows(data)`, decoded and prepared in a child: for services and bulk work on strangers' files.

    Raises:
        ClipError: as `windows`, and where the child crashed, hung or wanted too much memory.
    """
    import torch  # not above: a child that only decodes does without, and starts in a fifth of the time

    request = {
        "modality": modality.name,
        "settings": modality.settings.model_dump(mode="json"),
        "limits": modality.limits.model_dump(mode="json"),
    }
    bounds: dict[str, Any] = {"seconds": seconds, "memory_bytes": memory_bytes}
    needed = (type(modality).__module__,)
    for header, values in isolated(_CLIP_ANSWERS, data, request, imports=needed, **bounds):
        yield Clip(values=torch.from_numpy(values), **header)


def clip_answers(data: bytes, request: Mapping[str, Any]) -> Iterator[Answer]:
    """In the child: the windows of the modality that the request describes."""
    from bridle.modalities import build_modality

    settings = request["settings"] | ({"isolate": False} if "isolate" in request["settings"] else {})
    modality = build_modality(request["modality"], settings, Limits.model_validate(request["limits"]))
    for clip in modality.windows(data):
        header = {"grid": clip.grid, "valid": clip.valid, "start_s": clip.start_s, "duration_s": clip.duration_s}
        yield header, clip.values.numpy()
