"""Measure a language model's plan and write its report: what `sparse-dit eval` does with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...environment import environment
from ...outputs import Outputs
from ...plan import Plan
from .atlas import text_heads
from .quality import LanguageRequest, Say, evaluate
from .report import LanguageReport, write_report


def evaluate_language_plan(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    request: LanguageRequest,
    folder: Path,
    *,
    command: str,
    say: Say,
    outputs: Outputs,
    overwrite: bool = False,
) -> tuple[LanguageReport, Path]:
    """Measure texts and questions, and write it all; the report, and the folder that it lies in.

    Args:
        model: A causal language model, not patched.
        tokenizer: Its tokenizer.
        plan: For that model.
        request: What is measured.
        folder: Where the report is written to; `outputs` has checked it.
        command: The command line, which the report notes.
        say: Called with a line of text before each part.
        outputs: What the command writes.
        overwrite: Whether files in the folder may be replaced.
    """
    texts = request.read_by(model, tokenizer)
    quality = evaluate(model, tokenizer, plan, request, say, texts)
    say("what every head computes of the first text")
    heads = text_heads(model, plan, next(iter(texts.values())))
    report = LanguageReport(
        f"{type(model).__name__}: sparse attention against dense",
        plan,
        quality,
        heads,
        {**environment(model.device), "command": command},
    )
    return report, outputs.write(
        folder, lambda path: write_report(path, report, overwrite=overwrite)
    )
