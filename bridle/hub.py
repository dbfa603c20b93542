"""Model folders by name: those of the Hugging Face hub, fetched and published, and those that ship with the package.

Weights are safetensors only.
"""

from __future__ import annotations

import logging
import re
from importlib import resources
from pathlib import Path
from typing import Any

from bridle.errors import MistakeError

log = logging.getLogger(__name__)
FILES = ("config.json", "model.safetensors", "README.md")
SCHEME = "hf://"
BUILTIN = "builtin:"
"""What the names of the models that ship with the package begin with."""
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class HubError(MistakeError):
    """The hub does not have it, does not let us, or cannot be reached."""


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """A model folder on this machine: the path itself, or a snapshot of ``owner/name``, ``hf://owner/name@revision``.

    ``builtin:MODALITY`` is the demo model that ships with the package.

    A path that exists, or whose parent does, is a path. revision: a branch, a tag or, best, a commit.

    Raises:
        HubError: no such repository, revision or permission, no network, or huggingface_hub is missing.
    """
    name = str(source)
    if name.startswith(BUILTIN):
        return _builtin(name.removeprefix(BUILTIN))
    path = Path(name.removeprefix(SCHEME).partition("@")[0])
    repo, _, pinned = name.removeprefix(SCHEME).partition("@")
    wanted = name.startswith(SCHEME) or (isinstance(source, str) and bool(_ID.fullmatch(repo)))
    if not wanted or (not name.startswith(SCHEME) and (Path(name).exists() or path.parent.exists())):
        return Path(source)
    if not _ID.fullmatch(repo):
        raise HubError(f"{name}: expected {SCHEME}OWNER/NAME or {SCHEME}OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repo, revision=revision or pinned or None, allow_patterns=list(FILES)))
    except ImportError:
        raise HubError(f"{name}: no such folder, and the hub needs pip install 'bridle[tokens]'") from None
    except Exception as error:  # the client has a dozen kinds
        raise HubError(f"{name}: no such folder here, and the hub says: {_said(error)}") from None
    if not (folder / FILES[0]).is_file():
        raise HubError(f"{name}: no such folder here, and the hub says: no {FILES[0]} at that revision")
    if not (revision or pinned):
        log.warning("%s: loaded at revision %s; pin it with %s@%s", name, folder.name, repo, folder.name)
    return folder


def _builtin(name: str) -> Path:
    folder = Path(str(resources.files("bridle") / "builtin"))
    known = sorted(entry.name for entry in folder.iterdir() if (entry / FILES[0]).is_file())
    if name not in known:
        raise HubError(f"model '{BUILTIN}{name}' is none that ships; these do: {', '.join(BUILTIN + n for n in known)}")
    return folder / name


def publish(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    branch: str | None = None,
    message: str = "Upload a BRIDLE model",
) -> str:
    """Uploads a model folder as one commit, and makes the repository if it is not there.

    Returns:
        The commit.

    Raises:
        HubError: see `local_folder`.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(FILES), commit_message=message, revision=branch
        )
    except ImportError:
        raise HubError("the hub needs pip install 'bridle[tokens]'") from None
    except Exception as error:
        raise HubError(f"{repo}: not published: {_said(error)}") from None
    return str(done.oid)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
