"""Takes one sample out of shards and writes it to a file.

python examples/one_clip.py builtin:audio-heldout 12 clip.flac
"""

from __future__ import annotations

import sys
from pathlib import Path

from bridle.data.shards import open_shards


def main(shards: str, number: str, target: str) -> None:
    """Writes sample `number` of `shards`, counted from 0."""
    sample = open_shards([shards], extensions=()).read(int(number))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_bytes(sample.data)
    print(f"{target}: {sample.key}.{sample.extension}, {len(sample.data)} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
