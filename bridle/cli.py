"""The `bridle` command: finds the command's file, parses, runs it, and turns mistakes into one clear line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

from bridle import __version__
from bridle.errors import MistakeError
from bridle.home import settle
from bridle.settings import RecipeError, nearest

COMMANDS = (
    "doctor",
    "shards",
    "launch",
    "export",
    "tokenize",
    "vocabulary",
    "pack",
    "corpus",
    "codebooks",
    "probe",
    "study",
    "finetune",
    "classify",
    "compare",
    "report",
    "status",
    "bench",
    "tune",
    "fetch-model",
    "serve",
)
"""Each is a file in bridle/commands/, with _ for -."""

OUR_FAULT = 70
"""Exit code of what nobody expected, as sysexits.h numbers it."""

EXTRAS = {
    "deepspeed": "train",
    "tensorboard": "train",
    "prometheus_client": "train",
    "decord": "train",
    "httpx": "serving",
}
"""What `pip install 'bridle[EXTRA]'` brings beyond the library. `bridle serve` names its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 on success, 2 on a wrong argument, 1 on failure, 70 on a fault of ours."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        os.environ["BRIDLE_TRACEBACK"] = "1"
    if arguments[:1] == ["--version"]:
        print(f"bridle {__version__}")
        return 0
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # no command here needs it
    return report_mistakes("bridle", lambda: _dispatch(arguments))


def report_mistakes(program: str, job: Callable[[], int]) -> int:
    """Runs `job`, where caches can be written, and prints a user's mistake as one line instead of a traceback.

    Returns:
        The exit code.
    """
    try:
        settle()
        return _traced(job)
    except RecipeError as error:
        # Every rank finds the same, and each node has its own log; what one may find alone has a class of its own.
        if os.environ.get("LOCAL_RANK", "0") == "0" or type(error) is not RecipeError:
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        return 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        advice = f"; it comes with pip install 'bridle[{extra}]'" if extra else ""
        print(f"{program}: error: {error}{advice}", file=sys.stderr)
        return 1
    except (MistakeError, OSError, ImportError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        shown = ""
        if not _traceback_wanted():
            shown = "; --traceback or BRIDLE_TRACEBACK=1 shows where"
            if program != "bridle":  # a job's log is read afterwards
                traceback.print_exc()
                shown = "; the lines above say where"
        whose = "unexpected: a fault of bridle's or of a library"
        print(f"{program}: internal error: {told} ({whose}{shown})", file=sys.stderr)
        return OUR_FAULT


def _traceback_wanted() -> bool:
    return os.environ.get("BRIDLE_TRACEBACK", "0") not in ("", "0")


def _traced(job: Callable[[], int]) -> int:
    """Runs `job`; prints the traceback of what it raises where `--traceback` or BRIDLE_TRACEBACK=1 asks for it."""
    try:
        return job()
    except Exception:
        if _traceback_wanted():
            traceback.print_exc()
        raise


def _file_of(command: str) -> ModuleType:
    return importlib.import_module(f"bridle.commands.{command.replace('-', '_')}")


def _dispatch(arguments: list[str]) -> int:
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    if wanted is None:
        return _overview(arguments)
    if wanted not in COMMANDS:
        raise RecipeError(f"command '{wanted}' is unknown{nearest(wanted, COMMANDS)}")
    module = _file_of(wanted)
    parser = argparse.ArgumentParser(prog=f"bridle {wanted}", description=module.HELP)
    module.add_arguments(parser)
    arguments.remove(wanted)
    try:
        args = parser.parse_intermixed_args(arguments)  # settings of a recipe may follow options
    except TypeError:  # argparse's word for a command that has commands
        args = parser.parse_args(arguments)
    return int(module.run(args))


def _overview(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bridle", description="Discrete tokens of sound, images and video.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        commands.add_parser(name, help=_file_of(name).HELP)
    parser.parse_args(arguments)
    parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main())
