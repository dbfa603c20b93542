"""Arguments of fine-tuning that its command and the program of its ranks have in common. It needs no training code."""

from __future__ import annotations

import argparse


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `bridle finetune` and of `bridle/finetune.py`."""
    parser.add_argument("--recipe", metavar="NAME|FILE", help="shipped name or YAML file (default: the mini recipe)")
    parser.add_argument("--heldout", nargs="+", metavar="SHARDS", help="labelled shards that it is scored on")
    parser.add_argument("--labels", metavar="MEMBER", help="member with labels: json (the default), cls, json.FIELD")
    parser.add_argument(
        "--fold",
        metavar="F",
        help="hold this fold out, train on the others (ESC-50: 1 to 5; anywhere: I/N, the I-th of N)",
    )
    parser.add_argument(
        "--scratch", action="store_true", help="random weights in the model's shape: what is pretraining worth?"
    )
    parser.add_argument("--run", metavar="DIR|URL", help="run folder; resumes from it (default: runs/finetune-RECIPE)")
    parser.add_argument("--allow-new-data", action="store_true", help="go on although the shards have changed")
