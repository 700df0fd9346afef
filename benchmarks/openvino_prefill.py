"""Time the prefill of a language model: OpenVINO GenAI beside PyTorch, exact and with plans, in turns.

    python benchmarks/openvino_prefill.py MODEL --openvino-python OV/bin/python --openvino-model OV_FP32 \
        --plan plan.json --out prefill

OpenVINO needs an environment of its own:

    python3 -m venv OV
    OV/bin/pip install torch openvino openvino-genai openvino-tokenizers optimum-intel nncf
    OV/bin/pip uninstall torchvision
    OV/bin/optimum-cli export openvino -m MODEL --task text-generation-with-past --weight-format fp32 OV_FP32

All in float32 on one thread. Seconds are CPU time of the process until the first new token. TRISHAPE leaves
out only what earlier chunks put into the cache, so it reads in chunks of 256 tokens; the others read the
prompt whole. OpenVINO doesn't tell the density. What it answers to hidden passkeys stands beside its time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (2048, 4096, 8192)
DEPTHS = (0.15, 0.5, 0.85)
WAYS = {  # of OpenVINO: sparse mode, tokens of a chunk, options of its SparseAttentionConfig
    "openvino dense": (None, 8192, {}),
    "openvino XATTENTION": ("XATTENTION", 8192, {}),
    "openvino TRISHAPE 128 + 384": (
        "TRISHAPE",
        256,
        {"num_retained_start_tokens_in_cache": 128, "num_retained_recent_tokens_in_cache": 384},
    ),
}
ANSWER = 6  # tokens said after a passkey question


def serve(folder: str) -> None:
    """OpenVINO's side: read `{"way", "ids", "new"}` lines, write `{"seconds", "ids"}` lines."""
    import numpy as np
    import openvino as ov  # pyright: ignore[reportMissingImports]
    import openvino_genai as genai  # pyright: ignore[reportMissingImports]

    made: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["way"] not in made:
            made[asked["way"]] = _pipeline(genai, folder, *WAYS[asked["way"]])
        new = asked["new"]
        config = genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False
        )
        before = time.process_time()
        (out,) = made[asked["way"]].generate(
            [ov.Tensor(np.array([asked["ids"]], np.int64))], [config]
        )
        seconds = time.process_time() - before
        ids = [int(token) for token in out.m_generation_ids[0]]
        print(json.dumps({"seconds": seconds, "ids": ids}), flush=True)


def _pipeline(
    genai: Any, folder: str, mode: str | None, chunk: int, options: dict[str, int]
) -> Any:
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = chunk
    config.cache_size = 1  # GB
    config.enable_prefix_caching = False
    if mode is not None:
        config.use_sparse_attention = True
        kind = getattr(genai.SparseAttentionMode, mode)
        config.sparse_attention_config = genai.SparseAttentionConfig(mode=kind, **options)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return genai.ContinuousBatchingPipeline(
        folder, config, "CPU", {"INFERENCE_NUM_THREADS": 1, **exact}
    )


class OpenVINO:
    """The process that `serve`s, and its ways to read."""

    def __init__(self, python: str, folder: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--serve", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, way: str, ids: list[int], new: int) -> tuple[float, list[int]]:
        """CPU seconds, and the tokens that were said."""
        assert self.process.stdin and self.process.stdout, "both are pipes"
        self.process.stdin.write(json.dumps({"way": way, "ids": ids, "new": new}) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # OpenVINO prints too
                answer = json.loads(line)
                return answer["seconds"], answer["ids"]
        raise SystemExit(f"{way} ended; what it said stands above")

    def close(self) -> None:
        """End the process."""
        with self.process:  # closes its pipes, and waits
            pass


class Torch:
    """The model in this process, stock and patched.

    Args:
        folder: Of the model.
        plans: Files of plans.
    """

    def __init__(self, folder: str, plans: list[str]) -> None:
        from sparse_dit.inputs import load_language_model
        from sparse_dit.plan import Plan

        self.model, self.tokenizer = load_language_model(folder, "cpu", "float32")
        self.ways: dict[str, Any] = {"torch": None, "exact": "exact"}
        self.ways |= {f"plan {Path(plan).stem}": Plan.from_pretrained(plan) for plan in plans}

    def run(self, way: str, ids: list[int], new: int) -> tuple[float, list[int], float]:
        """CPU seconds, the tokens that were said, and the density."""
        import torch

        from sparse_dit import patch

        given = torch.tensor([ids])
        handle = None if self.ways[way] is None else patch(self.model, self.ways[way])
        try:
            before = time.process_time()
            with torch.no_grad():
                out = self.model.generate(
                    given, attention_mask=torch.ones_like(given), max_new_tokens=new,
                    min_new_tokens=new, do_sample=False,
                )  # fmt: skip
            seconds = time.process_time() - before
        finally:
            if handle is not None:
                handle.remove()
        density = 1.0 if handle is None else handle.summary().density or 1.0
        return seconds, out[0, len(ids) :].tolist(), density


def measure(given: argparse.Namespace, theirs: OpenVINO) -> list[dict[str, Any]]:
    """A row for each way, length and repeat, and for each passkey."""
    from sparse_dit.eval.language.haystack import sources
    from sparse_dit.search.language.reading import passkeys
    from sparse_dit.whole_file import write_text

    ours = Torch(given.model, given.plan)
    text = given.text.read_text() if given.text else next(iter(sources().values()))
    ids = ours.tokenizer(text).input_ids
    rows: list[dict[str, Any]] = []

    def add(way: str, prompt: list[int], new: int, number: str = "", **facts: Any) -> None:
        if way in WAYS:
            seconds, said = theirs.run(way, prompt, new)
            density = None
        else:
            seconds, said, density = ours.run(way, prompt, new)
        if number:
            facts["found"] = number in ours.tokenizer.decode(said)
        rows.append(
            {"way": way, "tokens": len(prompt), "seconds": seconds, "density": density, **facts}
        )
        write_text(given.out.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
        print(rows[-1], flush=True)

    every = [*ours.ways, *WAYS]
    for way in every:  # what is made at the first call isn't timed
        add(way, ids[:256], 1, repeat=-1)
    for tokens in given.lengths:
        if len(ids) < tokens:
            raise SystemExit(f"the text has {len(ids)} tokens, --lengths asks for {tokens}")
        for repeat in range(given.repeats):
            for way in every:
                add(way, ids[:tokens], 1, repeat=repeat)
        if tokens > given.asked_to:
            continue
        for key in passkeys(ours.tokenizer, tokens, DEPTHS):
            number = ours.tokenizer.decode(key.ids[0, -key.answer :]).strip()
            for way in every:
                prompt = key.ids[0, : -key.answer].tolist()
                add(way, prompt, ANSWER, number, depth=key.depth)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: least seconds of each way and length, over those of torch, with density and passkeys."""
    lengths = sorted({row["tokens"] for row in rows if row.get("repeat", -1) >= 0})
    lines = ["| | " + " | ".join(f"{n:,} tokens" for n in lengths) + " | passkeys |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for tokens in lengths:
            mine, stock = (
                [r for r in rows if (r["way"], r["tokens"]) == (w, tokens) and "repeat" in r]
                for w in (way, "torch")
            )
            least, dense = (min(r["seconds"] for r in side) for side in (mine, stock))
            density = mine[0]["density"]
            told = "" if density is None or density == 1 else f", density {density:.3f}"
            cells.append(f"{least:.1f} s ({dense / least:.2f}x{told})")
        asked = [row["found"] for row in rows if row["way"] == way and "found" in row]
        lines.append(f"| {way} | {' | '.join(cells)} | {sum(asked)} of {len(asked)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the rows and print a table."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--openvino-python", required=True, help="Python that has openvino-genai")
    parser.add_argument("--openvino-model", required=True, help="the model as OpenVINO's export")
    parser.add_argument("--plan", action="append", default=[], help="a plan; repeatable")
    parser.add_argument("--text", type=Path, help="what is read; default a source of Python's")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--asked-to", type=int, default=4096, help="longest passkey question")
    parser.add_argument("--out", type=Path, default=Path("prefill"), help="JSON of the rows")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with contextlib.closing(OpenVINO(given.openvino_python, given.openvino_model)) as theirs:
        rows = measure(given, theirs)
    print(table(rows))


if __name__ == "__main__":
    main()
