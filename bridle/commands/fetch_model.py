"""`bridle fetch-model URL MODEL_DIR`: a model folder from S3 or a web server, checked before it has its name."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

from bridle.commands.local_path import local_path
from bridle.data import fetch
from bridle.files import sha256, whole_folder
from bridle.remote.access import is_url, shown, unknown_scheme
from bridle.settings import RecipeError

HELP = "fetch a model folder from s3://, https:// or another store and check its sha256"
FILES = ("config.json", "model.safetensors")
"""What makes a model folder, in the order of the digest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("url", metavar="URL", help="of the folder: s3://bucket/models/audio, https://host/models/audio")
    parser.add_argument("target", metavar="MODEL_DIR", type=local_path, help="folder to write, whole or not at all")
    parser.add_argument(
        "--sha256",
        metavar="HEX",
        help=f"what it must be: the output of `sha256sum {' '.join(FILES)} | sha256sum` in the folder",
    )


def run(args: argparse.Namespace) -> int:
    """Fetches, unless the folder with that digest is there already.

    Raises:
        RecipeError: a URL or a digest that is none; what was fetched has another digest: nothing is written then.
        ShardError: the files cannot be had.
        OSError: they cannot be written.
    """
    wanted = args.sha256.lower() if args.sha256 is not None else None
    if wanted is not None and not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise RecipeError(f"--sha256 {args.sha256!r}: expected 64 hexadecimal digits")
    if not is_url(args.url) or unknown_scheme(args.url):
        raise RecipeError(f"{shown(args.url)}: expected the URL of a model folder, s3://… or https://…")
    if wanted and is_there(args.target, wanted):
        print(f"{args.target}: there already, sha256 {wanted}")
        return 0
    with whole_folder(args.target) as aside:
        for name in FILES:
            url = f"{args.url.rstrip('/')}/{name}"
            fetch.download(url, aside / name, sys.maxsize)
        found = digest(aside)
        if wanted not in (None, found):
            raise RecipeError(
                f"{shown(args.url)}: sha256 {found}, expected {wanted}; nothing was written:"
                " upload the model again, or give the sha256 of the one you mean"
            )
    print(f"{args.target}: fetched from {shown(args.url)}, sha256 {found}{'' if wanted else ' (not checked)'}")
    return 0


def digest(folder: Path) -> str:
    """One SHA-256 for both files; `sha256sum config.json model.safetensors | sha256sum` prints it too."""
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in FILES)
    return hashlib.sha256(lines.encode()).hexdigest()


def is_there(folder: Path, wanted: str) -> bool:
    """Whether the folder is the wanted model, byte for byte."""
    return all((folder / name).is_file() for name in FILES) and digest(folder) == wanted
