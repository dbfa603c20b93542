"""What the engine refuses or cannot do. It knows no HTTP: `serving/web/problems.py` says what each is to a client."""

from __future__ import annotations

from bridle.modalities.clip import ClipError


class EngineError(Exception):
    """Base of all below. The message says what was found, what was expected and what to do."""


class ChoiceError(EngineError):
    """A model or modality was asked for that is not loaded, or two that do not fit."""


class UnknownKindError(EngineError):
    """Content that no loaded model recognises."""


class EmptyError(EngineError):
    """No content at all."""


class AnswerTooLargeError(EngineError):
    """An answer of more numbers than the service holds."""


class ReloadError(EngineError):
    """A model cannot be loaded again; the old one stays."""


class ProcessEndedError(EngineError):
    """A process ended, or has no room, through no fault of the request: the same request may succeed."""


class DeadlineError(EngineError):
    """The request took longer than it may."""

    def __init__(self) -> None:
        super().__init__("the deadline passed; allow more time, send less, or try when it is quieter")


class FaultError(EngineError):
    """A fault of ours, in a process whose traceback comes along for the log."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class FileError(EngineError):
    """A file of a request is at fault.

    index: of the file in the request; cause: what is wrong with it.
    """

    def __init__(self, index: int, cause: ClipError) -> None:
        super().__init__(str(cause))
        self.index = index
        self.cause = cause
