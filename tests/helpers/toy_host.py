"""A host of one module: a plain PyTorch transformer that refines a grid of tokens and says a word for each.

It has no pipeline, no scheduler and no video; what a plan spoils is the divergence of its words.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, scaled_dot_product_attention

from sparse_dit.call import AttentionCall, StepContext
from sparse_dit.generation import GenerationSettings
from sparse_dit.layout import TokenLayout
from sparse_dit.timing import Timer

LAYOUT = TokenLayout.video(4, 8, 8)
HEADS, HEAD_DIM, WORDS = 2, 16, 10
CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        self.merge = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return x + self.merge(self.attend(2 * q, 2 * k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Toy(nn.Module):
    config: ClassVar[dict[str, Any]] = {"heads": HEADS, "head_dim": HEAD_DIM, "words": WORDS}
    device, dtype = CPU, torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Attention(), Attention())
        self.words = nn.Linear(HEADS * HEAD_DIM, WORDS)

    def forward(self, x: Tensor, level: float) -> Tensor:
        return level * self.layers(x) + (1 - level) * x


class Attached:
    def __init__(self, model: Toy, intercept: Any) -> None:
        self.model, self.intercept, self.context = model, intercept, StepContext()
        self.lost: list[str] = []
        self.replaced = False
        self.hook = model.register_forward_pre_hook(self.before)
        for name, layer in self_attention_layers(model).items():
            vars(layer)["attend"] = functools.partial(self.call, name, layer.attend)
        vars(model)["attached"] = self

    def before(self, model: nn.Module, args: tuple[Tensor, float]) -> None:
        begins = self.context.sigma is None or args[1] > self.context.sigma
        run, step = (1, 0) if begins else (0, self.context.step + 1)
        self.context = StepContext(LAYOUT, args[1], run=self.context.run + run, step=step)

    def call(self, name: str, stock: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def same() -> Tensor:
            return stock(q, k, v)

        return self.intercept(
            AttentionCall(name, q, k, v, None, None, None, self.context, None, same)
        )

    def begin_run(self) -> None:
        self.context = replace(self.context, sigma=None)

    def detach(self) -> None:
        self.hook.remove()
        self.intercept = None
        vars(self.model).pop("attached", None)
        for layer in self_attention_layers(self.model).values():
            vars(layer).pop("attend", None)


def components(model: Toy) -> dict[str, nn.Module]:
    return {"toy": model}


def self_attention_layers(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Attention)}


def heads_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(self_attention_layers(module), (HEADS, HEAD_DIM))


def attach(module: Toy, intercept: Any, pipe: Any = None) -> Attached:
    return Attached(module, intercept)


def attachment_of(module: nn.Module) -> Attached | None:
    return vars(module).get("attached")


def output_projection(layer: Attention) -> nn.Module:
    return layer.merge


@dataclass(frozen=True)
class Refining:
    model: Toy
    settings: GenerationSettings
    loss: ClassVar[str] = "kl"
    quality: ClassVar[str] = "kl"
    device: torch.device = CPU
    has_larger: bool = False

    def check(self, case: Any) -> None:
        pass

    @torch.no_grad()
    def run(self, case: Any, after_step: Any = None) -> tuple[Any, Any]:
        drawn, timer = torch.Generator().manual_seed(case.seed), Timer(self.device)
        x = torch.randn(1, LAYOUT.seq_len, HEADS * HEAD_DIM, generator=drawn)
        for step in range(self.settings.steps):
            x = self.model(x, 1 - step / self.settings.steps)
            if after_step and after_step(x):
                return None, timer.stop()
        return self.model.words(x)[0].log_softmax(-1).numpy(), timer.stop()

    def difference(self, output: Any, reference: Any) -> dict[str, float]:
        mine, dense = torch.from_numpy(output), torch.from_numpy(reference)
        kl = kl_div(mine, dense, reduction="batchmean", log_target=True)
        return {"kl": kl.item()}

    def with_steps(self, steps: int) -> Refining:
        return replace(self, settings=replace(self.settings, steps=steps))

    def plain(self) -> Refining:
        return self

    reduced = plain

    def larger(self) -> None:
        return None


workload = Refining
