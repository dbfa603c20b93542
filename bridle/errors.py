"""The root of what users can mend."""

from __future__ import annotations


class MistakeError(ValueError):
    """What was asked for, or a file of theirs, will not do: the message says what was found and what to do about it.

    A ValueError that is not one of these is a fault of ours.
    """
