"""The one error that a wrong plan raises, and how its message quotes what was found."""

from __future__ import annotations

from typing import Any


class PlanError(ValueError):
    """A plan can't be read, written or used.

    The message is one line: where, what must hold, what was got, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(_printable(message).split()))


class UnwritablePlan(PlanError, OSError):
    """A plan is fine but can't be written where it should; it can elsewhere.

    Args:
        message: See `PlanError`.
        reason: The part of it that isn't the place.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.strerror = reason or message


def short(value: Any, limit: int = 60) -> str:
    """`repr` of an untrusted value, cut to `limit` characters."""
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _printable(text: str) -> str:
    return "".join(
        c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text
    )
