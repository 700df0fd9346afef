"""What a command writes in the end: tried at its start, and not lost if it can't be written after all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .whole_file import partial_name

MOVED = 3  # exit code of a command that is done, but had to write elsewhere than it was told
_TRIES = 100  # names beside one that is taken


class Outputs:
    """The files of one command.

    Args:
        replace: Whether the user wants files that exist to be replaced.
        say: Called with a line of text if a result must go elsewhere.
    """

    def __init__(self, *, replace: bool, say: Callable[[str], None]) -> None:
        self.code = 0  # exit code
        self._replace = replace
        self._say = say
        self._known: dict[Path, tuple[str, Callable[[Path], Sequence[Path]], bool]] = {}
        self._owner: dict[Path, str] = {}
        self._lies: dict[Path, Path] = {}

    def expect(
        self,
        option: str,
        path: Path,
        *endings: str,
        beside: Callable[[Path], Sequence[Path]] = lambda path: (),
        again: bool = False,
    ) -> None:
        """Check that `path` can be written; nothing is left behind.

        Args:
            option: The option that names it, as typed.
            path: A file.
            endings: One of them must be its own; any will do if there are none.
            beside: Gives the files that are written with one at a path.
            again: It may be there: it is gone on with, or made anew.

        Raises:
            ValueError, OSError: If it couldn't be written; one line in the user's words.
        """
        if endings and path.suffix not in endings:
            wanted = " or ".join(endings)
            raise ValueError(f"{option} must name a file that ends in {wanted}, got {path.name!r}")
        files = [path, *beside(path)]
        for file in files:
            other = self._owner.setdefault(file.absolute(), option)
            if other != option:
                raise ValueError(f"{option} and {other} would both write {file}; name another file")
            check_writable(file, option)
        if not again and not self._replace:
            check_free(option, files, "--force")
        self._known[path] = option, beside, again

    def expect_folder(self, option: str, folder: Path, names: Sequence[str]) -> None:
        """Check that files of these names can be written into a folder, which needn't be there.

        Raises:
            ValueError, OSError: See `expect`.
        """
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"{option}: {folder} is a file: give a folder")
        if not self._replace:
            check_free(option, [folder / name for name in names], "--force")
        for name in names:
            check_writable(folder / name, option)
        self._known[folder] = option, lambda path: [path / name for name in names], False

    def write(self, path: Path, write: Callable[[Path], object]) -> Path:
        """Write what was expected, elsewhere if it must be; where it lies is returned.

        Raises:
            OSError, ValueError: If it can be written nowhere.
        """
        _, beside, again = self._known[path]

        def taken(place: Path) -> Path | None:
            files = beside(place) if place.is_dir() else [place, *beside(place)]
            return next((file for file in files if os.path.lexists(file)), None)

        free = (lambda place: None) if again or self._replace else taken
        self._lies[path] = rescued(path, write, self._say, free, taken)
        if self.lies(path) != path:
            self.code = MOVED
        return self.lies(path)

    def put(self, path: Path, write: Callable[[Path], object]) -> Path:
        """Write what may be replaced, as often as there is more to write; where it lies is returned.

        If it must go elsewhere, it goes there from then on.

        Raises:
            OSError: If it can be written nowhere.
        """
        before = self.lies(path)
        self._lies[path] = rescued(before, write, self._say)
        if self.lies(path) != path:
            self.code = MOVED
        return self.lies(path)

    def lies(self, path: Path) -> Path:
        """Where it was written: at `path`, if nothing kept it from being."""
        return self._lies.get(path, path)


def check_writable(path: Path, name: str) -> None:
    """Raise unless a file can be made at `path` or its place taken; nothing is left behind.

    Args:
        path: Its folder needn't be there.
        name: The option or argument that gives the path, for the message.

    Raises:
        ValueError, OSError: If the file can't be made, with a message of one line.
    """
    try:
        if os.path.lexists(path) and not path.is_file() and not path.is_symlink():
            what = "is a folder; give a file name in it" if path.is_dir() else "is no regular file"
            raise ValueError(f"{name}: {path} {what}")
        folder = path.absolute().parent
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(
                f"{name}: {folder} is a file, so {path} can't be made; name another"
            )
        _try(folder / partial_name(path))
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(
            f"{name}: {path} can't be written ({error.strerror}); name another place"
        ) from None


def rescued(
    path: Path,
    write: Callable[[Path], object],
    say: Callable[[str], None],
    taken: Callable[[Path], Path | None] = lambda path: None,
    taken_beside: Callable[[Path], Path | None] = lambda path: (
        path if os.path.lexists(path) else None
    ),
) -> Path:
    """Write to `path`; if that can't be, beside it, in the working folder or in the one for temporary files.

    Args:
        path: A file or a folder.
        write: Called with the path to write to; must leave nothing behind if it raises.
        say: Called with a line of text if it isn't `path`.
        taken: Gives the file that keeps `path` from being written.
        taken_beside: The same for other places.

    Returns:
        Where it lies.

    Raises:
        OSError, ValueError: What `path` gave, if it can be written nowhere.
    """
    first: Exception | None = None
    if there := taken(path):
        first = FileExistsError(
            f"{there.name} exists by now" if there != path else "it exists by now"
        )
    else:
        try:
            write(path)
            return path
        except OSError as error:
            first = error
    for other in _others(path, taken_beside):
        try:
            write(other)
        except OSError:  # the next one
            continue
        say(f"{path} can't be written ({_reason(first)}): the result is in {other}")
        return other
    raise first


def _others(path: Path, taken: Callable[[Path], Path | None]) -> Iterator[Path]:
    """A free name in each folder that may do."""
    for folder in dict.fromkeys((path.parent, Path.cwd(), Path(tempfile.gettempdir()))):
        names = (f"{path.stem}-{n}{path.suffix}" for n in range(2, _TRIES))
        for name in [*([path.name] if folder != path.parent else []), *names]:
            if taken(folder / name) is None and not os.path.lexists(folder / name):
                yield folder / name
                break


def check_free(name: str, files: Sequence[Path], replace: str) -> None:
    """Raise FileExistsError if one of these files is there.

    Args:
        name: The option or argument that says where they lie.
        files: What is to be written.
        replace: What to pass so that they may be replaced.
    """
    if there := [file for file in files if os.path.lexists(file)]:
        names = ", ".join(map(str, there))
        verb, them = ("exist", "them") if len(there) > 1 else ("exists", "it")
        raise FileExistsError(
            f"{name}: {names} {verb} already: pass {replace} to replace {them}, or name another"
        )


def _try(file: Path) -> None:
    try:
        with file.open("xb") as opened:
            opened.write(b"\0")
    finally:
        file.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error)
