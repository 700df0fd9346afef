"""A plan as text: strict JSON in, JSON that diffs well out.

JSON as Python reads it by default is laxer than RFC 8259 and than what a plan may hold: it takes
NaN, numbers beyond any type, and a key twice. All of that is refused here, with its place.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ..texts import decoded
from .errors import PlanError, short

MAX_DEPTH = 24
MAX_STRING = 1 << 16
MAX_COLUMNS = 100

_CONTROL = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")

_COMPONENT = ("components", "*")
_BROKEN = {
    (),
    ("components",),
    _COMPONENT,
    *((*_COMPONENT, name) for name in ("stages", "patterns", "layers", "evidence")),
    (*_COMPONENT, "evidence", "*"),
}
_ONE_LINE = {
    *((*_COMPONENT, name, "*") for name in ("stages", "patterns", "layers")),
    (*_COMPONENT, "evidence", "*", "*"),
}


class _Bad:
    """Stands in a parsed document for something that JSON allows to write and a plan doesn't."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def parse(data: bytes, *, what: str = "a plan") -> dict[str, Any]:
    """The object that a plan's JSON text holds; only finite numbers, no key twice, bounded depth.

    Args:
        data: The text.
        what: What its errors call it.

    Raises:
        PlanError: If `data` isn't UTF-8, isn't JSON, or holds what a plan may not hold.
    """
    try:
        text = decoded(data)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if not text.strip():
        raise PlanError(f"the file is empty; it must hold {what}")
    try:
        document = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise PlanError(f"not valid JSON at {where} ({error.msg}); is it complete?") from None
    except RecursionError:
        raise PlanError(f"nested deeper than {MAX_DEPTH} levels") from None
    document = plain(document)
    if not isinstance(document, dict):
        raise PlanError(f"{what} must be a JSON object, got {short(document)}")
    return document


def plain(value: Any, path: tuple[str | int, ...] = ()) -> Any:
    """A deep copy of `value` in JSON's own types (tuples become lists).

    Raises:
        PlanError: If it holds something that JSON doesn't have, or a plan may not hold.
    """
    if len(path) > MAX_DEPTH:
        raise PlanError(f"{place(path[:4])}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return _string(value, path)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise PlanError(f"{place(path)}: an integer must fit 64 bits, got {value.bit_length()}")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PlanError(f"{place(path)}: a number must be finite, got {value}")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {_string(k, path): plain(item, (*path, k)) for k, item in value.items()}
    if isinstance(value, _Bad):
        raise PlanError(f"{place(path)}: {value.reason}")
    raise PlanError(f"{place(path)}: must be plain numbers or text, got {type(value).__name__}")


def place(path: tuple[Any, ...]) -> str:
    """Where something is in the document: `components.transformer.layers."blocks.0.attn1"[0]`."""
    words = ""
    for step in path:
        if isinstance(step, int):
            words += f"[{step}]"
            continue
        name = str(step)[:80]
        name = name if name.isidentifier() else f'"{name}"'
        words += f".{name}" if words else name
    return words or "plan"


def render(document: dict[str, Any]) -> bytes:
    """Text of a plan: one stage, one pattern, one layer a line; the same bytes for equal plans."""
    return (_text(document, (), "") + "\n").encode("utf-8")


def _text(value: Any, path: tuple[str, ...], indent: str) -> str:
    """JSON of `value`; over several lines where `_BROKEN` says so or where it doesn't fit one."""
    kind = path
    if path[:1] == ("components",):
        kind = tuple("*" if i == 1 or i > 2 else step for i, step in enumerate(path))
    if not isinstance(value, list | dict) or not value:
        return _line(value)
    if kind not in _BROKEN:
        line = _line(value)
        if kind in _ONE_LINE or len(indent) + len(line) <= MAX_COLUMNS:
            return line
    deeper = indent + "  "
    if isinstance(value, dict):
        items = [f"{_line(k)}: {_text(v, (*path, k), deeper)}" for k, v in value.items()]
        opening, closing = "{", "}"
    else:
        items = [_text(v, (*path, ""), deeper) for v in value]
        opening, closing = "[", "]"
    body = ",\n".join(deeper + item for item in items)
    return f"{opening}\n{body}\n{indent}{closing}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            return _Bad(f"the key {short(key)} occurs twice")
        result[key] = value
    return result


def _integer(digits: str) -> Any:
    if len(digits) > 20:
        return _Bad(f"an integer must fit 64 bits, got one of {len(digits)} characters")
    return int(digits)


def _constant(name: str) -> Any:
    return _Bad(f"a number must be finite, got {name}")


def _string(text: Any, path: tuple[str | int, ...]) -> str:
    if not isinstance(text, str):
        raise PlanError(f"{place(path)}: a key must be text, got {short(text)}")
    if len(text) > MAX_STRING:
        raise PlanError(f"{place(path)}: a text must have at most {MAX_STRING} characters")
    if _CONTROL.search(text):
        raise PlanError(f"{place(path)}: control characters are not allowed, got {short(text)}")
    return text
