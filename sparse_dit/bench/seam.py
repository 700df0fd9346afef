"""What a patch costs where nothing is skipped: the seam itself, with a dense plan.

The call is timed around an attention function that does nothing, so that microseconds show; attention at the
given size is timed by itself, to say what share of it they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import StepContext
from ..layout import TokenLayout
from ..patterns import Dense, Pattern
from ..plan import ComponentPlan, HeadChoice, Stage
from ..runtime import Runtime
from .measure import Timing, interleaved

LAYER = "blocks.0.attn1"
REPEATED = 500  # calls in one sample: a clock can't see one


@dataclass(frozen=True)
class SeamCost:
    """What a patched transformer takes longer by, without any sparse attention; times in seconds.

    Args:
        tokens, heads, head_dim: The size of the dense attention call that it is compared with, batch 1.
        call: What a plan of dense heads adds to one attention call.
        forward: What the patch adds to one forward of a transformer, beside its attention calls.
        attention: What the attention call itself takes.
        copies: How many of q, k and v reached the attention function in other memory than they came in.
    """

    tokens: int
    heads: int
    head_dim: int
    call: float
    forward: float
    attention: float
    copies: int

    @property
    def share(self) -> float:
        """What the patch adds to an attention call, as a share of that call's own time."""
        return self.call / self.attention


def measure_seam(
    tokens: int = 4096, heads: int = 2, head_dim: int = 64, clock: str = "cpu", rounds: int = 9
) -> SeamCost:
    """Time the seam and attention on the CPU.

    Args:
        tokens, heads, head_dim: The size of the attention call, batch 1.
        clock: As in `interleaved`.
        rounds: As in `interleaved`.
    """
    q, k, v = torch.randn(3, 1, tokens, heads, head_dim)
    from ..integrations.idle import SEEN

    runs = _seam(q, k, v)
    copies = sum(a.data_ptr() != b.data_ptr() for a, b in zip(SEEN, (q, k, v), strict=True))
    first, second, third = (x.transpose(1, 2) for x in (q, k, v))
    runs["attention"] = lambda: F.scaled_dot_product_attention(first, second, third)
    with torch.no_grad():
        found = interleaved(runs, clock=clock, rounds=rounds)
    call, forward = _added(found)
    return SeamCost(tokens, heads, head_dim, call, forward, found["attention"].seconds, copies)


def share_of_generation(
    calls: int, layers: int, seconds: float, clock: str = "cpu", rounds: int = 3
) -> float:
    """What the seam adds to a dense generation, as a share of it: its time in Python, see `measure_seam`.

    Two whole generations differ by more than that from one run to the next, so it isn't measured as their
    difference. On a GPU it is an upper bound, as Python runs ahead of the device.

    Args:
        calls: How many attention calls the generation has.
        layers: How many of them one forward has.
        seconds: What the whole generation takes.
        clock: As in `interleaved`.
        rounds: As in `interleaved`.
    """
    with torch.no_grad():
        runs = _seam(*torch.randn(3, 1, 64, 2, 64))
        call, forward = _added(interleaved(runs, clock=clock, rounds=rounds))
    return (calls * call + calls / max(layers, 1) * forward) / seconds


def _seam(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """A call and a forward with the seam and without, each repeated; q, k and v have been seen."""
    from ..integrations.idle import calls, forward_hook

    _, tokens, heads, head_dim = q.shape
    layout = TokenLayout.video(1, 1, tokens)
    context = StepContext(layout, 0.5, "cond", 0, 0)
    stock, patched = calls(q, k, v, LAYER, context, _runtime(layout, heads, head_dim))
    patched()
    return {
        "stock": _often(stock),
        "patched": _often(patched),
        "hook": _often(forward_hook()),
        "no hook": _often(lambda: None),
    }


def _added(found: Mapping[str, Timing]) -> tuple[float, float]:
    """Seconds that the seam adds to a call, and to a forward."""
    seconds = {name: timing.seconds / REPEATED for name, timing in found.items()}
    return seconds["patched"] - seconds["stock"], seconds["hook"] - seconds["no hook"]


def _often(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(REPEATED):
            call()

    return run


def _runtime(layout: TokenLayout, heads: int, head_dim: int) -> Runtime:
    dense = (HeadChoice(Pattern(Dense())),) * heads
    plan = ComponentPlan(
        model_class="WanTransformer3DModel",
        config_hash="0" * 64,
        heads={LAYER: (heads, head_dim)},
        layout=layout,
        stages=(Stage(1.0, 0.0),),
        layers={LAYER: (dense,)},
    )
    return Runtime("transformer", plan, "auto")
