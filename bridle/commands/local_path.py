"""Arguments that name a place on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from bridle.remote.access import is_url


def local_path(text: str) -> Path:
    """The path; a URL would become a folder called ``s3:``.

    Raises:
        ArgumentTypeError: it is a URL.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL, expected a path on this machine")
    return Path(text)
