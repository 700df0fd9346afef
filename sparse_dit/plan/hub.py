"""Where a plan's name leads: a path, a plan that ships with the package, or the hub."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ..resources import shipped
from .errors import PlanError, short
from .storage import PLAN_FILE, tensor_path, usable

BUILT_IN = r"[a-z0-9]+([._-][a-z0-9]+)*"
HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"


def find(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The file or folder of a plan: an existing path, a built-in name, or a hub id.

    Args:
        name: A path goes before a built-in name, that before a hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        PlanError: If it is none of these, or can't be downloaded.
    """
    text = os.fspath(name)
    path = usable(text)
    if path.exists():
        return path
    if re.fullmatch(BUILT_IN, text):
        folder = next((f for f in _built_in_folders() if f.name == text), None)
        if folder is not None:
            return folder
    if re.fullmatch(HUB_ID, text, re.ASCII) and ".." not in text and not text.endswith(".json"):
        return _download(text, revision)
    raise PlanError(
        f"no plan {short(text)}: must be a file or folder that exists, a hub id (owner/name), "
        f"or built in: {', '.join(built_in()) or 'none in this installation'}"
    )


def built_in() -> list[str]:
    """Names of the plans that ship with the package."""
    return [folder.name for folder in _built_in_folders()]


def push(plan: Any, repo_id: str, *, private: bool | None, message: str) -> str:
    """Upload a plan's files; see `Plan.push_to_hub`."""
    if not re.fullmatch(HUB_ID, repo_id, re.ASCII) or ".." in repo_id:
        raise PlanError(f"a hub id must be owner/name, got {short(repo_id)}")
    hub = _library()
    with tempfile.TemporaryDirectory() as folder:
        plan.save_pretrained(folder)
        try:
            api = hub.HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except (OSError, ValueError) as error:
            raise PlanError(f"can't push to {repo_id}: {_first_line(error)}") from None
    return str(commit)


def _built_in_folders() -> list[Path]:
    try:
        folders = sorted(shipped("profiles").iterdir())
    except FileNotFoundError:
        return []  # an installation without profiles: the caller says that it has none
    return [folder for folder in folders if (folder / PLAN_FILE).is_file()]


def _download(repo_id: str, revision: str | None) -> Path:
    """Folder of one commit of a hub repository, with the plan's two files alone."""
    files = [PLAN_FILE, tensor_path(Path(PLAN_FILE)).name]
    try:
        folder = Path(
            _library().snapshot_download(repo_id, revision=revision, allow_patterns=files)
        )
    except (OSError, ValueError) as error:
        raise PlanError(
            f"no plan {repo_id!r} on this machine, and the hub didn't give it: {_first_line(error)}"
        ) from None
    if not (folder / PLAN_FILE).is_file():
        raise PlanError(f"the hub repository {repo_id} must hold a {PLAN_FILE}, and has none")
    return folder


def _library() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise PlanError(
            "plans on the hub need the package huggingface_hub: pip install huggingface_hub"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no reason given'}"
