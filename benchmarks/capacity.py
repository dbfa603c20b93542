"""What one pod of the service can do, and what it needs: the figures that docs/runbook.md computes replicas from.

    python benchmarks/capacity.py MODEL_DIR|RECIPE FILE ... [--clients 16] [--seconds 30] [serve's flags]

A recipe's name stands for its model with random weights, which costs the same. Each call sends one file; clients ask
again once answered. CPU seconds a call are of all the service's processes, and the figure to trust where others use the
machine as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from http_load import Running, closed_loop, free_port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR|RECIPE")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model if Path(args.model).is_dir() else write_random(args.model, Path(scratch) / args.model)
        print(json.dumps(measure(str(model), args, flags), indent=1))


def measure(model: str, args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Starts the service, loads it, and reads its processes' CPU and memory off."""
    port, began = free_port(), time.perf_counter()
    command = [sys.executable, "-m", "bridle.cli", "serve", model, f"--port={port}", "--lame-duck-seconds=0"]
    with Running([*command, "--log-level=warning", "--max-queue=1024", *flags], port, "/readyz") as server:
        ready = time.perf_counter() - began
        requests = [(whole_request(Path(file).read_bytes(), port), 1) for file in args.files]
        asyncio.run(closed_loop(port, requests, args.clients, 2.0))
        peak = [server.memory()]
        rest, cpu = peak[0], server.cpu()
        watched = threading.Event()

        def watch() -> None:
            while not watched.wait(1.0):
                peak[0] = max(peak[0], server.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        times, calls, took = asyncio.run(closed_loop(port, requests, args.clients, args.seconds))
        watched.set()
        watcher.join()
        spent = server.cpu() - cpu
    return {
        "model": args.model,
        "cores": os.cpu_count(),
        "seconds_to_ready": round(ready, 1),
        "calls": calls,
        "calls_per_second": round(calls / took, 2),
        "cpu_seconds_per_call": round(spent / calls, 4),
        "cores_at_work": round(spent / took, 2),
        "median_seconds": round(statistics.median(times), 3),
        "memory_mb_after_warm_up": round(rest / 1e6),
        "memory_mb_at_most": round(peak[0] / 1e6),
    }


def whole_request(content: bytes, port: int) -> bytes:
    """The bytes of one call."""
    head = f"POST /tokenize HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def write_random(recipe_name: str, folder: Path, **clip: Any) -> Path:
    """The recipe's model with weights that nobody trained. clip: settings of the modality in place of the recipe's."""
    import torch

    from bridle.config import load_recipe
    from bridle.modalities import build_modality
    from bridle.model_folder import patch_shape, save_model
    from bridle.modeling.bridle import Components

    recipe = load_recipe(recipe_name)
    settings_of_clip = recipe.clip | clip
    components = Components(recipe.model, patch_shape(build_modality(recipe.modality, settings_of_clip)))
    tokenizer = components.tokenizer(0)
    generator = torch.Generator().manual_seed(0)
    settings = recipe.model.quantizer
    first = torch.randn(2 * settings.codebook_size, settings.dim, generator=generator)
    tokenizer.quantizer.initialize(first, generator)
    save_model(
        folder,
        name=recipe_name,
        modality=recipe.modality,
        clip=settings_of_clip,
        encoder_settings=recipe.model.encoder,
        quantizer_settings=settings,
        encoder=components.encoder(0).state_dict(),
        tokenizer=tokenizer.state_dict(),
        learned=True,
        trained={"steps": 0},
    )
    return folder


if __name__ == "__main__":
    main()
