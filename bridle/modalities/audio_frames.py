"""Sound as a model sees it: 16 kHz, in frames of 25 ms every 10 ms."""

from __future__ import annotations

SAMPLE_RATE = 16_000
WINDOW = 400
"""Samples of one frame: 25 ms."""
HOP = 160
"""Samples from one frame to the next: 10 ms."""
FRAMES_PER_SECOND = SAMPLE_RATE / HOP


def frame_count(samples: int) -> int:
    """Whole frames in so many samples (Kaldi's `snip_edges`); 0 below one window."""
    return max(0, 1 + (samples - WINDOW) // HOP)
