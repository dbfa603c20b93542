"""`bridle doctor`: one line for each thing that pretraining and serving need of a machine."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

HELP = "say what works on this machine, and what to do about what does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--run", default="runs", metavar="DIR", help="folder whose disk to look at (default: runs)")
    parser.add_argument("--cache", metavar="DIR", help="folder of remote shards (default: the user's cache folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the findings. Returns 0 if pretraining can run here, 1 if not."""
    from bridle.data.cache import default_folder
    from bridle.diagnostics import examine

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch and DeepSpeed remark on what is said here in order
    try:
        checks = examine(Path(args.run), Path(args.cache) if args.cache else default_folder())
    finally:
        logging.disable(before)
    blocked = [check.name for check in checks if check.blocks]
    if args.json:
        print(json.dumps({"can_pretrain": not blocked, "checks": [asdict(check) for check in checks]}, indent=2))
        return int(bool(blocked))
    for check in checks:
        print(f"{check.status:8}{check.name:16}{check.found}")
        if check.advice:
            print(f"{'':24}-> {check.advice}")
    print(f"pretraining cannot run here: see {', '.join(blocked)}" if blocked else "pretraining can run here")
    return int(bool(blocked))
