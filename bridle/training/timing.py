"""Where the time of a step goes, told apart without making the host wait for the device."""

from __future__ import annotations

import time

import torch

PARTS = ("data_wait", "forward", "backward", "optimizer", "codebooks")
"""Of a step, in their order: waiting for clips and handing them over; frozen half and forward pass; the backward pass;
gradients' exchange, clipping and AdamW; codebooks and counts."""


class PartTimes:
    """Seconds spent in each part since the last reset.

    On CPUs the host's clock tells. On CUDA an event is recorded where a part ends, which costs the host microseconds,
    and is read by `seconds`; only waiting for clips is the host's own time. A GPU that waits for the host's next
    kernel spends that in the part at hand.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self._spare += [event for _, event in self._events]
        self._events.clear()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "", time.perf_counter()

    def begin(self, part: str) -> None:
        """Ends the part at hand; `part` begins. An empty one: none does."""
        now = time.perf_counter()
        if self._part and (not self._on_cuda or self._part == PARTS[0]):
            self._spent[self._part] += now - self._since
        if self._on_cuda:
            event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((part, event))
        self._part, self._since = part, now

    def seconds(self) -> dict[str, float]:
        """Of each part. On CUDA it waits for the last part to end, so ask when a row is due."""
        spent = dict(self._spent)
        if self._events:
            self._events[-1][1].synchronize()
        for (part, began), (_, ended) in zip(self._events, self._events[1:], strict=False):
            if part and part != PARTS[0]:
                spent[part] += began.elapsed_time(ended) / 1e3
        return spent
