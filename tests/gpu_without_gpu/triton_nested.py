"""Calls of device functions in Triton's interpreter, for tests only (slow in 3.7.1).

It replaces the functions of the language anew at each call of a device function, though they are replaced
already while a kernel runs: a third of the time.
"""

from __future__ import annotations

from triton.runtime import interpreter


def install() -> None:
    """Replace them at the first call of each module's functions only, in this process."""
    slow, seen = interpreter.InterpretedFunction.__call__, set()

    def call(function, *arguments, **keywords):
        module = function.fn.__module__
        if module not in seen:
            seen.add(module)
            return slow(function, *arguments, **keywords)
        try:
            return function.rewrite()(*arguments, **keywords)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
