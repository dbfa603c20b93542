"""`bridle serve`: the HTTP service."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from bridle.settings import RecipeError

HELP = "Serve models over HTTP: bytes in, codes out. Every flag is also an environment variable, BRIDLE_<FLAG>."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `ServeSettings`."""
    from serving.settings import ServeSettings

    parser.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL_DIR",
        help="model folders, such as runs/NAME/models/final, or builtin:audio, builtin:image, builtin:video",
    )
    parser.add_argument("--new-key", metavar="NAME", help="print a new API key and the line that admits it, then exit")
    parser.add_argument("--scopes", default="use", help="scopes of the new key, joined by + (use, metrics, admin)")
    parser.add_argument("--http-process", help=argparse.SUPPRESS)  # one of several, started by the first
    for name, field in ServeSettings.model_fields.items():
        if name != "models":
            parser.add_argument(f"--{name.replace('_', '-')}", dest=f"set_{name}", metavar="VALUE", help=_help(field))


def run(args: argparse.Namespace) -> int:
    """Serves until a signal ends it."""
    from serving.settings import read_settings, unknown_variables
    from serving.web.keys import KeyRing, new_key

    if args.new_key is not None:
        key, line = new_key(args.new_key, tuple(args.scopes.split("+")))
        print(f"key, shown once: {key}", file=sys.stderr)
        print(line)
        return 0
    if args.http_process is not None:
        _begin_template()
        from serving.fleet import run_one

        return run_one(args.http_process)
    flags: dict[str, Any] = {k.removeprefix("set_"): v for k, v in vars(args).items() if k.startswith("set_")}
    if args.models:
        flags["models"] = tuple(args.models)
    settings = read_settings(flags, os.environ)
    KeyRing(settings)  # wrong keys are told now, not after the imports
    try:
        if settings.http_processes == 1:
            _begin_template()
        from serving.fleet import run_fleet
        from serving.logs import log
        from serving.run import serve
    except ImportError as error:
        raise RecipeError(f"{error.name} is missing; install bridle[serving]") from None
    for line in unknown_variables(os.environ):
        log("warning", line)
    return serve(settings) if settings.http_processes == 1 else run_fleet(settings)


def _begin_template() -> None:
    """It imports for seconds; so does what comes next."""
    from serving.workers.template import start_workers_template

    start_workers_template()


def _help(field: FieldInfo) -> str:
    default = field.default
    shown = ",".join(default) if isinstance(default, tuple) else default
    choices = f" One of {', '.join(get_args(field.annotation))}." if get_origin(field.annotation) is Literal else ""
    text = (field.description or "") + choices + (f" Default: {shown}." if shown not in (None, "", ()) else "")
    return text.replace("%", "%%").replace("`", "")
