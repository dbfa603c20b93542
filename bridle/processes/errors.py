"""How a child process can disappoint."""

from __future__ import annotations

from bridle.errors import MistakeError


class RefusedError(MistakeError):
    """What a child's work refuses on purpose: the input is at fault. Its subclasses travel by their names."""


class ForeignRefusalError(RefusedError):
    """A `RefusedError` of a child's, known here by the name of its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChildError(MistakeError, RuntimeError):
    """A child that cannot start: nothing about its input, something about this machine."""


class ProcessGoneError(ConnectionError):
    """The process ended. `code` is its exit code, minus the signal where one ended it; none if unknown."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the process ended with code {code}")
        self.code = code


class SlowError(TimeoutError):
    """No answer within the time that the child has."""


class ProtocolError(ConnectionError):
    """A message that the protocol does not allow: the process is not to be trusted any more."""


class ChildFaultError(RuntimeError):
    """Something in the child failed that nobody expected. `memory`: it ran out of memory; `traceback`: the child's."""

    def __init__(self, message: str, traceback: str, *, memory: bool) -> None:
        super().__init__(message)
        self.traceback = traceback
        self.memory = memory
