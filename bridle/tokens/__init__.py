"""Code streams to and from a language model's token ids, and data sets of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["webdataset_stage"]

if TYPE_CHECKING:
    from bridle.tokens.stage import webdataset_stage


def __getattr__(name: str) -> Any:
    if name == "webdataset_stage":  # torch is only imported by those who need it
        from bridle.tokens.stage import webdataset_stage

        return webdataset_stage
    raise AttributeError(f"module 'bridle.tokens' has no attribute '{name}'")
