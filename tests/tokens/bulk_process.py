"""A bulk job in a process of its own that can be killed; forked from a template, so that it begins at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess

from bridle.data.loaders import start_template

_CONTEXT = multiprocessing.get_context("forkserver")


def start(arguments: list[str], environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Begins `bridle ARGUMENTS`; its exit code is the process's."""
    start_template("bridle.tokens.job", "bridle.tokens.bulk", "bridle.commands.tokenize", "pyarrow.parquet")
    process = _CONTEXT.Process(target=_run, args=(arguments, dict(environment or {})))
    process.start()
    return process


def _run(arguments: list[str], environment: Mapping[str, str]) -> None:
    from bridle.cli import main

    os.environ.update(environment)
    sys.exit(main(arguments))
