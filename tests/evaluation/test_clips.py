"""Pictures of clips: what is hidden and what is coded lies where the content lies, in every modality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import write_random_model

import bridle
from bridle.config import MaskSettings
from bridle.data.shards import open_shards
from bridle.evaluation.clips import FRAMES, HIDDEN, code_colours, show_clips
from bridle.modalities import build_modality
from bridle.modalities.clip import Clip
from bridle.modeling.masking import draw_mask

CLIPS = {
    "audio": {"seconds": 1.0},
    "image": {"size": [64, 96]},
    "video": {"frames": 8, "stride": 2, "size": [64, 96], "isolate": False},
}
MASKS = {name: MaskSettings(kind="tube" if name == "video" else "random", ratio=0.5) for name in CLIPS}


def _moments(pixels: np.ndarray, film: bool) -> list[np.ndarray]:
    """A tile taken apart: a film's frames, or the one picture there is."""
    if not film:
        return [pixels]
    opaque = pixels[0, :, 3] == 255
    edges = np.flatnonzero(np.diff(np.concatenate([[False], opaque, [False]]).astype(int)))
    return [pixels[:, a:b, :3] for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", CLIPS)
def test_hidden_patches_are_painted_where_their_content_is(name: str) -> None:
    """A clip that is bright exactly where the mask is: its picture must be bright exactly where grey is painted."""
    modality = build_modality(name, CLIPS[name])
    shards = open_shards([f"builtin:{name}-heldout"], extensions=modality.extensions)
    shown = show_clips(shards, modality, MASKS[name], None, count=1)[0]
    index = next(i for i in range(len(shards)) if shown.name.startswith(shards.read(i).key))
    clip = next(iter(modality.windows(shards.read(index).data)))
    grid = tuple(clip.grid.values())
    mask = draw_mask(MASKS[name], grid, np.random.default_rng(index)).reshape(grid)
    for axis, side in enumerate(modality.patch):
        mask = mask.repeat_interleave(side, dim=axis)
    values = torch.where(mask, 9.0, -9.0).expand(clip.values.shape)
    full = clip.grid[modality.axes[0]]
    bright = modality.picture(Clip(values, clip.grid, full, clip.start_s, clip.duration_s)).mean(-1) > 128
    if name == "video":
        bright = bright[np.linspace(0, len(bright), FRAMES, endpoint=False).astype(int)]
    else:
        bright = bright[None]
    assert 0.3 < bright.mean() < 0.7
    plain, painted = (_moments(tile.pixels, name == "video") for tile in shown.tiles)
    for there, without, with_grey in zip(bright, plain, painted, strict=True):
        assert (with_grey[there] == HIDDEN).all()
        np.testing.assert_array_equal(with_grey[~there], without[~there])


@pytest.mark.parametrize("name", CLIPS)
def test_code_maps_show_the_code_of_each_patch(name: str, tmp_path: Path) -> None:
    model = bridle.load(write_random_model(tmp_path / "model", modality=name, clip=CLIPS[name]))
    shards = open_shards([f"builtin:{name}-heldout"], extensions=model.modality.extensions)
    shown = show_clips(shards, model.modality, MASKS[name], model, count=1)[0]
    index = next(i for i in range(len(shards)) if shown.name.startswith(shards.read(i).key))
    clip = next(iter(model.modality.windows(shards.read(index).data)))
    codes = model.codes(clip.values[None])[0].numpy().reshape(*clip.grid.values(), 4)
    assert len(shown.tiles) == 2 + 4
    for stage, tile in enumerate(shown.tiles[2:]):
        expected = code_colours(codes[..., stage])
        if name == "audio":
            expected = expected[: clip.valid].swapaxes(0, 1)[::-1]
        steps = [expected] if name != "video" else expected[:: clip.grid["time"] // FRAMES]
        for frame, colours in zip(_moments(tile.pixels, name == "video"), steps, strict=True):
            side = model.modality.patch[-1]
            np.testing.assert_array_equal(frame[side // 2 :: side, side // 2 :: side][:, : colours.shape[1]], colours)


def test_codes_have_colours_of_their_own() -> None:
    colours = code_colours(np.arange(1024))
    assert len(np.unique(colours, axis=0)) > 1000
    neighbours = np.abs(colours[1:].astype(int) - colours[:-1]).max(-1)
    assert neighbours.min() > 30
