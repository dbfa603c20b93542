"""Which GPU a rank takes, whatever started it."""

from __future__ import annotations

from bridle.settings import OneRankError


def device_index(local: int, visible: int) -> int:
    """The device of a node's rank `local`, of those that it sees: its own, or the only one, where whoever started the
    ranks shows each a device of its own (srun --gpus-per-task=1, CUDA_VISIBLE_DEVICES).

    Raises:
        OneRankError: fewer devices than ranks.
    """
    if visible == 1:
        return 0
    if local >= visible:
        raise OneRankError(
            f"LOCAL_RANK {local} has no device: this process sees {visible} (CUDA_VISIBLE_DEVICES); start as many ranks"
            " on a node as it has GPUs, or show each rank one GPU of its own"
        )
    return local
