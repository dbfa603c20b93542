"""What a large picture takes of memory while it is decoded."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

SIDE = 4000
SCRIPT = """
import json, re, sys
from pathlib import Path
from bridle.modalities import build_modality
from bridle.modalities.clip import Limits

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

modality = build_modality("image", {"size": [64, 64]}, Limits(max_pixels=50_000_000))
small, *large = (Path(name).read_bytes() for name in sys.argv[1:])
list(modality.windows(small))
taken = []
for content in large:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most that there was so far
    before = status("VmRSS")
    (clip,) = modality.windows(content)
    taken.append(status("VmHWM") - before)
print(json.dumps(taken))
"""
MOST = {("JPEG", "RGB"): 1.0, ("PNG", "L"): 13.0, ("PNG", "RGB"): 16.0, ("PNG", "RGBA"): 16.0}
"""Bytes a pixel: a JPEG is decoded at an eighth of its size; a PNG whole, in Pillow's memory and in torch's."""


def test_a_large_picture_takes_so_many_bytes_a_pixel(tmp_path: Path) -> None:
    names = []
    for number, (side, (kind, mode)) in enumerate([(100, ("JPEG", "RGB")), *((SIDE, case) for case in MOST)]):
        file = io.BytesIO()
        Image.new(mode, (side, side), 200 if mode == "L" else (200, 10, 20, 90)[: len(mode)]).save(file, kind)
        (tmp_path / str(number)).write_bytes(file.getvalue())
        names.append(str(tmp_path / str(number)))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=True)
    taken = {case: round(size / SIDE**2, 1) for case, size in zip(MOST, json.loads(done.stdout), strict=True)}
    assert all(taken[case] < most for case, most in MOST.items()), taken
    assert taken["PNG", "RGB"] > 3  # it is measured at all
