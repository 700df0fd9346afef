"""`sparse-dit demo --model dlm`: a small diffusion language model writes, dense beside sparse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..environment import environment
from ..eval.denoising.prompts import Prompt, begun, hidden
from ..eval.denoising.ways import Patched
from ..eval.denoising.writing import Trajectory, Writing
from ..eval.page import environment as templates
from ..outputs import Outputs
from ..patch import patch
from ..resources import shipped
from ..timing import Pairs, Taken
from ..whole_file import write_text
from .run import stamped

FILES = ("report.html", "report.json")
TEXT = "held_out.txt"  # beside the model: of a seed that it wasn't trained on
RULE = "online"
DEPTHS = (0.2, 0.5, 0.8)
SHOWN = 360  # characters of a prompt's beginning and end


@dataclass(frozen=True)
class Size:
    """How long prompts are, and what is written after them."""

    tokens: int
    writing: Writing


FULL = Size(1984, Writing(64, 32, 16))
QUICK = Size(320, Writing(32, 16, 4))


@dataclass(frozen=True, eq=False)
class Written:
    """What was written after a prompt, and how it came about.

    Args:
        tokens: int64 `[length]`.
        frames: The same after each step, the mask token where nothing is written yet.
        taken: How long it took.
    """

    tokens: Tensor
    frames: list[Tensor]
    taken: Taken


def run_writing_demo(
    folder: Path, force: bool = False, quick: bool = False, outputs: Outputs | None = None
) -> dict[str, Any]:
    """Let the embedded diffusion language model write dense and sparse, and report.

    Writes `report.html`, on which one watches both texts appear, and `report.json`.

    Args:
        folder: The folder that is written to; made if it isn't there.
        force: Whether files of an earlier demo may be replaced.
        quick: A small size at which attention hardly matters: to see that everything runs.
        outputs: Where the command writes to; it knows afterwards what had to be written to another place.

    Returns:
        What `report.json` holds.

    Raises:
        FileExistsError: If `folder` holds files of an earlier demo and `force` is not given.
        FileNotFoundError: If this installation lacks the model.
        ValueError, OSError: If it can't be written.
    """
    from ..inputs import load_denoiser
    from ..tables import out
    from ..texts import read_text

    say = stamped()
    outputs = outputs or Outputs(replace=force, say=say)
    outputs.expect_folder("--out", folder, FILES)
    size, model = QUICK if quick else FULL, shipped("tiny_dlm")
    pipe = load_denoiser(str(model), "cpu", "float32")
    text = read_text(model / TEXT)
    prompts = [begun(pipe.tokenizer, "a text that goes on", text, size.tokens)]
    prompts += hidden(pipe.tokenizer, "a text", text, size.tokens, DEPTHS)
    report = compare(pipe, prompts, size.writing, say)
    page = templates().get_template("writing.html.j2").render(report=report)

    def write(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        write_text(path / "report.html", page)

    lies = outputs.write(folder, write)
    out.print(report["summary"], markup=False, highlight=False)
    for name in FILES:
        out.print(f"wrote {lies / name}", markup=False, highlight=False, soft_wrap=True)
    return report


def compare(
    pipe: Any, prompts: list[Prompt], writing: Writing, say: Callable[[str], None]
) -> dict[str, Any]:
    """What is written after each prompt dense and sparse in turn, as `report.json` has it.

    Its figures: `speedup` of whole generations, `density` of the attention that was computed,
    `token_agreement` (the share of written tokens that are dense's), `passkey` (the share of hidden numbers
    that are said) and `passkey_dense`, `kl` of masked tokens along dense's trajectory.
    """
    dense, sparse, divergences, trajectories = [], [], [], []
    computed = pairs = 0.0
    summary, kept = "", 0
    for prompt in prompts:
        say(f"{prompt.name}: dense, then sparse")
        trajectories.append(Trajectory(pipe.mask_token_id, writing.block))
        with trajectories[-1].recorded(pipe):  # which warms up too
            write(pipe, prompt, writing)
        dense.append(write(pipe, prompt, writing))
        with patch(pipe, RULE) as handle:
            sparse.append(write(pipe, prompt, writing))
            account = Patched(handle)
            computed, pairs = computed + account.computed, pairs + account.pairs
            kept, summary = max(kept, account.kept_bytes), str(handle.summary())
        with patch(pipe, RULE):
            divergences.append(trajectories[-1].divergence(pipe))
    timed = Pairs([one.taken for one in dense], [one.taken for one in sparse])
    cases = [_case(pipe, *one) for one in zip(prompts, dense, sparse, strict=True)]
    asked = [case for case in cases if case["answer"] is not None]
    return {
        "title": "A diffusion language model, dense beside sparse",
        "rule": RULE,
        "tokens": max(prompt.ids.shape[1] for prompt in prompts) + writing.length,
        "dense_seconds": round(sum(one.taken.seconds for one in dense), 3),
        "sparse_seconds": round(sum(one.taken.seconds for one in sparse), 3),
        "speedup": round(timed.speedup, 4),
        "speedup_caution": timed.caution,
        "density": round(computed / max(1.0, pairs), 5),
        "token_agreement": round(_mean([case["agreement"] for case in cases]), 5),
        "passkey": _mean([float(case["right"]) for case in asked]),
        "passkey_dense": _mean([float(case["dense_right"]) for case in asked]),
        "kl": round(_mean(divergences), 6),
        "writing": {"length": writing.length, "block": writing.block, "steps": writing.steps},
        "cases": cases,
        "summary": summary,
        "provenance": environment(pipe.model.device),
    }


def write(pipe: Any, prompt: Prompt, writing: Writing) -> Written:
    """What a pipeline writes after a prompt, with what there is after each step."""
    frames: list[Tensor] = []
    start = prompt.ids.shape[1]
    mask = pipe.mask_token_id

    def after_step(ids: Tensor) -> None:
        frame = ids.new_full((writing.length,), mask)
        there = ids[start : start + writing.length]
        frame[: len(there)] = there
        frames.append(frame)

    tokens, taken = writing.run(pipe, prompt.ids, after_step)
    return Written(tokens, frames, taken)


def _case(pipe: Any, prompt: Prompt, dense: Written, sparse: Written) -> dict[str, Any]:
    text = pipe.tokenizer.decode(prompt.ids[0], skip_special_tokens=True)
    same = (dense.tokens == sparse.tokens).tolist()
    said = [pipe.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in (dense, sparse)]
    answer = prompt.answer
    return {
        "name": prompt.name,
        "begins": text[:SHOWN],
        "ends": text[-SHOWN:],
        "answer": answer,
        "dense_text": said[0],
        "sparse_text": said[1],
        "dense_right": answer is not None and answer in said[0],
        "right": answer is not None and answer in said[1],
        "agreement": round(sum(same) / len(same), 5),
        "same": same,
        "dense_seconds": round(dense.taken.seconds, 3),
        "sparse_seconds": round(sparse.taken.seconds, 3),
        "dense_frames": [_pieces(pipe, frame) for frame in dense.frames],
        "sparse_frames": [_pieces(pipe, frame) for frame in sparse.frames],
    }


def _pieces(pipe: Any, frame: Tensor) -> list[str | None]:
    """The text of each token; None where nothing is written yet."""
    tokens = frame.tolist()
    return [None if t == pipe.mask_token_id else pipe.tokenizer.decode([t]) for t in tokens]


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
