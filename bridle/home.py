"""Where caches go where little can be written: in a container with a read-only root, for a user without a home."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bridle.settings import RecipeError

LIBRARIES = {
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
}
"""Variables that tell libraries where to write, which know XDG_CACHE_HOME not, or look elsewhere first."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME``, or ``~/.cache``, or where that cannot be written, a folder for temporary files of this user.

    Raises:
        RecipeError: not even temporary files can be written.
    """
    usual = _usual()
    return usual if usual is not None and _writable(usual) else _temporary()


def settle() -> None:
    """Lets this process and its children cache where they may write; does nothing where the usual place will do.

    Libraries would each make a folder of their own at every start, and say so.

    Raises:
        RecipeError: not even temporary files can be written.
    """
    folder = cache_folder()
    if folder == _usual():
        return
    os.environ["XDG_CACHE_HOME"] = str(folder)
    for variable, name in LIBRARIES.items():
        os.environ.setdefault(variable, str(folder / name))


def _usual() -> Path | None:
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no such user
        return None


def _writable(folder: Path) -> bool:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """The same folder each time, and nobody else's: names in a folder for temporary files can be taken by anyone."""
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise RecipeError(
            "no folder for temporary files can be written (TMPDIR, /tmp, /var/tmp and the current folder were tried);"
            " mount one: docker run --tmpfs /tmp, in Kubernetes an emptyDir at /tmp"
        ) from None
    folder = place / f"bridle-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o077 and folder.is_dir() and not folder.is_symlink():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="bridle-"))
