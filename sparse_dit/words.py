"""An argument's name as the one who reads the message gave it: `min_psnr` in Python, `--min-psnr` typed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TYPED: ContextVar[bool] = ContextVar("a command was typed", default=False)

_OPTIONS = {  # where it isn't the name with dashes
    "calibration": "--prompt",
    "counts": "--count",
    "densities": "--density",
    "device_table": "--cost-table",
    "methods": "--method",
    "overwrite=True": "--force",
    "prompts": "--prompt",
}


@contextmanager
def command_line() -> Iterator[None]:
    """Inside the block messages name options."""
    token = _TYPED.set(True)
    try:
        yield
    finally:
        _TYPED.reset(token)


def option(argument: str) -> str:
    """What to call a Python argument in a message.

    Args:
        argument: Its name, with a value if there is only one that makes sense: `overwrite=True`.
    """
    if not _TYPED.get():
        return argument
    return _OPTIONS.get(argument, "--" + argument.replace("_", "-"))
