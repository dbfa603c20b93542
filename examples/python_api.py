"""From a sound file to codes, embeddings and back to latents, in Python.

python examples/python_api.py runs/demo/model runs/demo/clip.flac
"""

from __future__ import annotations

import sys

import bridle


def main(folder: str, sound: str) -> None:
    """Prints what a model makes of a file."""
    model = bridle.load(folder)
    print("model:", {key: model.info[key] for key in ("name", "codebooks", "codebook_size", "positions_per_second")})

    stream = model.tokenize(sound)  # codes: [positions, codebooks], row-major over the grid
    print(f"grid {stream.grid}, {stream.duration_s:.2f} s, codes {list(stream.codes.shape)}")
    print("the first time step:", stream.codes[: stream.grid["frequency"]].tolist())

    embeddings = model.encode(sound)  # [positions, width]: what a classifier would start from
    print(f"embeddings {list(embeddings.shape)}, mean norm {embeddings.norm(dim=1).mean():.3f}")

    latents = model.dequantize(stream.codes)
    coarse = model.dequantize(stream.codes[:, :1])  # the first codebook alone
    distance = (latents - coarse).norm(dim=1).mean()
    print(f"latents {list(latents.shape)}; the first codebook alone is {distance:.3f} away from all of them")


if __name__ == "__main__":
    main(*sys.argv[1:])
