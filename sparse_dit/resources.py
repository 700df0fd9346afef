"""Files that ship with the package but live outside of it in the repository."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PLACES = {
    "profiles": (_PACKAGE / "_profiles", _PACKAGE.parent / "profiles"),
    "tiny_wan": (_PACKAGE / "_tiny_wan", _PACKAGE.parent / "demos" / "tiny_wan" / "model"),
    "tiny_dlm": (_PACKAGE / "_tiny_dlm", _PACKAGE.parent / "demos" / "tiny_dlm" / "model"),
}


def shipped(name: str) -> Path:
    """Folder of shipped files: `"profiles"` (plans), `"tiny_wan"` or `"tiny_dlm"` (embedded models).

    An installed package carries them inside itself, a checkout has them at its top level.

    Raises:
        FileNotFoundError: If this installation lacks them.
    """
    for place in _PLACES[name]:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"this installation of sparse_dit lacks {name!r}; reinstall the package"
    )
