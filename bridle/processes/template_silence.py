"""The first module that the template imports: it ends without a word when the one who asks is killed in mid-request.

multiprocessing's own answer to a request that breaks off is a traceback, from the template or from the child that it
has just forked: of no use to a user whose trainer was killed, and it hides the line that says so.
"""

import sys
from types import TracebackType


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, (EOFError, ConnectionError)) and kind.__name__ != "UnpicklingError":
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _hook
