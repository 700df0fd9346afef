"""Time a whole denoising step of Wan 2.1 on a GPU, dense and sparse, and compare it with the forecast.

    python benchmarks/wan_step.py --json wan.json                    # 1.3B at 480p, 81 frames
    python benchmarks/wan_step.py --model 14b --grid 21x45x80 --layers 8
    python benchmarks/wan_step.py --dry                              # tiny, on the CPU: says nothing of speed

Weights are random: a step takes as long as with real ones, and what it computes means nothing. So this says
what a density is worth in seconds, not which density a video can bear.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_dit
from sparse_dit.bench.lists import layout_of
from sparse_dit.bench.measure import interleaved
from sparse_dit.doctor import packages
from sparse_dit.environment import environment
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage
from sparse_dit.search.cost import CostTable, measure_cost, nearest_tiles
from sparse_dit.token_order import MODEL, TOKEN_ORDERS
from sparse_dit.whole_file import whole_file

MODELS = {  # heads, layers, width of the feed-forward part; heads have 128 channels
    "1.3b": (12, 30, 8960),
    "14b": (40, 40, 13824),
    "dry": (2, 2, 64),
}
TEXT_TOKENS, TEXT_DIM, DRY_GRID = 512, 4096, "2x4x6"


@dataclass
class Row:
    """One way to run a step; times are medians of seconds.

    Args:
        name: What ran.
        density: Of attention, all layers.
        seconds, spread: Of a step, and its samples' quartile distance over it.
        speedup, forecast: Against stock, measured and by the cost table; None for what needs none.
        backends: That ran.
    """

    name: str
    density: float
    seconds: float
    spread: float
    speedup: float
    forecast: float | None
    backends: list[str]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; exit code 2 without a GPU."""
    options = _options(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("error: this needs a GPU that torch sees; --dry runs on the CPU", file=sys.stderr)
        return 2
    device, dtype = ("cpu", torch.float32) if options.dry else ("cuda", torch.bfloat16)
    heads, layers, width = MODELS["dry" if options.dry else options.model]
    layers = options.layers or layers
    layout = layout_of(DRY_GRID if options.dry else options.grid)
    transformer = _transformer(heads, layers, width, device, dtype)
    call = _call(transformer, layout, device, dtype)
    with torch.inference_mode():
        table = measure_cost(
            layout, heads, 128, device=device, dtype=dtype, budgets=options.density
        )
        rows = _measure(transformer, call, layout, table, options)
    for row in rows:
        forecast = "" if row.forecast is None else f"  forecast {row.forecast:.2f}x"
        print(f"{row.name:48} density {row.density:6.1%} {1e3 * row.seconds:9.1f} ms "
              f"{row.speedup:5.2f}x{forecast}  {', '.join(row.backends)}")  # fmt: skip
    if options.dry:
        print("a dry run: its times are of this CPU and of a tiny model, and say nothing of a GPU")
    report = {
        "version": 1, "dry": options.dry, "model": options.model, "grid": layout.grid, "layers": layers,
        "environment": {**environment(device), **packages()}, "cost": table.to_dict(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    if options.json:
        with whole_file(options.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    parser.add_argument(
        "--model", choices=[name for name in MODELS if name != "dry"], default="1.3b"
    )
    parser.add_argument(
        "--grid", default="21x30x52", help="latent frames, rows and columns in tokens"
    )
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _transformer(heads: int, layers: int, width: int, device: str, dtype: torch.dtype) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.device(device):
        made = WanTransformer3DModel(
            num_attention_heads=heads, num_layers=layers, ffn_dim=width, text_dim=TEXT_DIM
        )
    kept = set(made._keep_in_fp32_modules)  # as when its weights are loaded
    for name, parameter in made.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return made.eval()


def _call(
    transformer: Any, layout: TokenLayout, device: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A forward pass at the size of `layout`, batch 1."""
    generator = torch.Generator().manual_seed(0)
    frames, rows, columns = layout.grid
    size = (1, 16, frames, 2 * rows, 2 * columns)
    latents = torch.randn(size, generator=generator).to(device, dtype)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator).to(device, dtype)
    timestep = torch.tensor([500], device=device)

    def call() -> Tensor:
        out = transformer(latents, timestep, text, return_dict=False)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return call


def _measure(
    transformer: Any, call: Callable[[], Tensor], layout: TokenLayout, table: CostTable,
    options: argparse.Namespace,
) -> list[Row]:  # fmt: skip
    """Stock, then a dense plan, and each density with tokens sorted in every layer and once a step."""
    heads = transformer.config.num_attention_heads
    calls = heads * len(transformer.blocks)
    want = call()
    stock = interleaved({"stock": call}, clock="wall", rounds=options.rounds)["stock"]
    rows = [Row("stock", 1.0, stock.seconds, stock.spread, 1.0, None, [])]
    patterns = [Pattern(Dense())] + [nearest_tiles(layout, d, True) for d in options.density]
    for pattern, order in itertools.product(patterns, TOKEN_ORDERS):
        if pattern.is_dense and order != MODEL:
            continue
        plan = _plan(transformer, layout, pattern)
        with sparse_dit.patch(transformer, plan, token_order=order) as handle:
            out = call()
            if pattern.is_dense and not torch.equal(out, want):
                raise AssertionError("a dense plan must compute what stock does, bit for bit")
            timing = interleaved({"patched": call}, clock="wall", rounds=options.rounds)["patched"]
            ran = {entry.backend or "stock" for entries in handle.ran.values() for entry in entries}
            density = handle.summary().density
        forecast = None
        if not pattern.is_dense:
            saved = calls * (table.dense - table.seconds(pattern, density))
            forecast = stock.seconds / (stock.seconds - saved)
        name = "a dense plan" if pattern.is_dense else f"nearest tiles {pattern.tile}, far field"
        name += "" if order == MODEL else ", sorted once"
        rows.append(Row(name, density, timing.seconds, timing.spread,
                        stock.seconds / timing.seconds, forecast, sorted(ran)))  # fmt: skip
    return rows


def _plan(transformer: Any, layout: TokenLayout, pattern: Pattern) -> Plan:
    """One pattern for every head of every layer at every noise level."""
    config = transformer.config
    layers = [f"blocks.{i}.attn1" for i in range(len(transformer.blocks))]
    heads = (HeadChoice(pattern),) * config.num_attention_heads
    component = ComponentPlan(
        model_class=type(transformer).__name__,
        config_hash="0" * 64,
        heads=dict.fromkeys(layers, (len(heads), config.attention_head_dim)),
        layout=layout,
        stages=(Stage(1.0, 0.0),),
        layers=dict.fromkeys(layers, (heads,)),
    )
    return Plan(pipeline_class="", density=0.0, components={"transformer": component})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
