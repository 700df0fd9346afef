"""What a worker tells of a text while it is written: a line for each step, which others read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ...plan import Plan
from ..spec import TextSpec
from .engine import Enough, TextEngine

CANVAS = "canvas.jsonl"
CUT = "\ufffd"  # what a tokenizer makes of a character whose other bytes are in the next token
Finish = Literal["stop", "length"]


@dataclass
class Settled:
    """The text of tokens that won't change any more.

    Args:
        tokenizer: Whose tokens they are.
        end: Id of the token that ends a text; None if there is none.
        stop: Texts before the first of which it ends.
    """

    tokenizer: Any
    end: int | None
    stop: list[str]
    text: str = ""
    tokens: int = 0
    finish: Finish | None = None
    _held: int = field(init=False)

    def __post_init__(self) -> None:
        self._held = max(map(len, self.stop), default=1) - 1

    def take(self, tokens: list[int], last: bool = False) -> str:
        """What these tokens add to the text; with `last` all of it, otherwise what can't change any more.

        Args:
            tokens: All from the first one on.
            last: Whether no others follow.
        """
        if self.finish is not None:
            return ""
        if self.end is not None and self.end in tokens:
            tokens, self.finish = tokens[: tokens.index(self.end)], "stop"
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        places = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if places:
            text, self.finish = text[: min(places)], "stop"
        elif self.finish is None and last:
            self.finish = "length"
        elif self.finish is None:
            text = text[: max(0, len(text) - self._held)].rstrip(CUT)
        added, self.tokens = text[len(self.text) :], len(tokens)
        self.text += added
        return added


def write_text(
    engine: TextEngine,
    spec: TextSpec,
    plan: Plan | None,
    folder: Path,
    say: Callable[[int, dict[str, Any]], None],
) -> dict[str, Any]:
    """Write what a job asks for, and a line of `canvas.jsonl` after each step.

    A line has `step`, `start` (the first token of the block), `tokens` (texts of the block's tokens, null
    where none is written yet) and `text` (what the blocks before add to the text).

    Args:
        engine: What writes.
        spec: What is asked for.
        plan: What attention computes; None for stock attention.
        folder: Where the file goes.
        say: Told percent and detail after each step; what it raises ends the job.

    Returns:
        What the API says of the finished job, JSON-ready.
    """
    tokenizer, mask = engine.pipe.tokenizer, engine.pipe.mask_token_id
    settled = Settled(tokenizer, engine.pipe.eos_token_id, spec.stop)
    phase, steps, began = "dense" if plan is None else "sparse", 0, time.perf_counter()
    with (folder / CANVAS).open("w", encoding="utf-8") as file:

        def after_step(ids: Tensor) -> None:
            nonlocal steps
            steps += 1
            written = ids[spec.prompt_tokens :][: spec.max_tokens].tolist()
            start = max(0, len(ids) - spec.block_length - spec.prompt_tokens)
            pieces = [None if t == mask else tokenizer.decode([t]) for t in written[start:]]
            text = settled.take(written[:start])
            line = {"step": steps, "start": start, "tokens": pieces, "text": text}
            file.write(json.dumps(line) + "\n")
            file.flush()
            say(99 * start // spec.max_tokens, {"phase": phase, "step": steps, "tokens": start})
            if settled.finish is not None:
                raise Enough

        made = engine.write(spec, plan, after_step)
        if made.tokens is not None:
            settled.take(made.tokens, last=True)
    return {
        "text": settled.text,
        "finish_reason": settled.finish,
        "completion_tokens": settled.tokens,
        "steps": steps,
        "inference_seconds": round(time.perf_counter() - began, 4),
        "summary": made.summary,
        "density": made.summary["density"] if made.summary else None,
    }
