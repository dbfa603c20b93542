"""BRIDLE: discrete tokens of sound, images and video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from bridle.model_folder import load


def __getattr__(name: str) -> Any:
    if name == "load":  # torch is only imported by those who need it
        from bridle.model_folder import load

        return load
    raise AttributeError(f"module 'bridle' has no attribute '{name}'")
