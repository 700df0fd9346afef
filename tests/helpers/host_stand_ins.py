"""Stand-ins of SGLang's and vLLM-Omni's modules, which need a GPU: what the plug-ins touch, as it is there.

Their signatures and fields are those of `CONTRACTS`, which `tests/hosts/test_servers.py` compares with the
packages' own sources where these are installed. What a stand-in computes is dense attention.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Contract(NamedTuple):
    package: str
    file: str
    name: str
    parameters: tuple[str, ...]


_S, _V = "sglang/multimodal_gen/runtime", "vllm_omni/diffusion"
_A, _B = f"{_S}/layers/attention", f"{_V}/attention/backends"
_IMPL = ("num_heads", "head_size", "softmax_scale", "causal", "num_kv_heads", "prefix")
_QKV = ("query", "key", "value", "attn_metadata")
CONTRACTS = [
    Contract("sglang", f"{_A}/backends/attention_backend.py", "AttentionImpl.__init__", _IMPL),
    Contract("sglang", f"{_A}/backends/attention_backend.py", "AttentionImpl.forward", _QKV),
    Contract(
        "sglang",
        f"{_A}/backends/attention_backend.py",
        "AttentionImpl.forward_into",
        ("query", "key", "value", "out", "attn_metadata"),
    ),
    Contract("sglang", f"{_A}/backends/attention_backend.py", "AttentionBackend.get_enum", ()),
    Contract("sglang", f"{_A}/backends/attention_backend.py", "AttentionBackend.get_impl_cls", ()),
    Contract(
        "sglang",
        f"{_A}/selector.py",
        "get_attn_backend",
        (
            *("head_size", "dtype", "supported_attention_backends", "selected_attention_backend"),
            *("attention_requirements", "default_attention_backend", "is_cross_attention"),
        ),
    ),
    Contract("sglang", f"{_A}/selector.py", "get_component_attn_backend_name", ()),
    Contract(
        "sglang",
        f"{_S}/managers/forward_context.py",
        "ForwardContext",
        (
            *("current_timestep", "attn_metadata", "forward_batch"),
            "_trtllm_gen_sequence_metadata_cache",
        ),
    ),
    Contract("sglang", f"{_S}/managers/forward_context.py", "get_forward_context_or_none", ()),
    Contract(
        "sglang",
        "sglang/srt/plugins/hook_registry.py",
        "HookRegistry.register",
        ("cls", "target", "hook", "hook_type", "source"),
    ),
    Contract("vllm-omni", f"{_B}/abstract.py", "AttentionImpl.forward", _QKV),
    Contract(
        "vllm-omni",
        f"{_B}/abstract.py",
        "AttentionImpl.__init__",
        (*_IMPL, "qkv_layout", "backend_kwargs"),
    ),
    Contract(
        "vllm-omni",
        f"{_B}/abstract.py",
        "VideoTokenLayout",
        ("prefix_len", "latent_grid", "used_len", "video_spans"),
    ),
    Contract(
        "vllm-omni",
        f"{_B}/abstract.py",
        "AttentionMetadata",
        (
            *("attn_mask", "joint_attn_mask", "joint_query", "joint_key", "joint_value"),
            *("joint_strategy", "extra", "full_attn_spans", "query_ranges", "video_layout"),
            "packed_padding",
        ),
    ),
    Contract(
        "vllm-omni", f"{_B}/registry.py", "register_diffusion_backend", ("backend", "class_path")
    ),
    Contract("vllm-omni", f"{_V}/forward_context.py", "is_forward_context_available", ()),
    Contract("vllm-omni", f"{_V}/forward_context.py", "get_forward_context", ()),
]
# fields that a class must have among others
FIELDS = {
    ("sglang", f"{_S}/pipelines_core/schedule_batch.py", "Req"): {
        *("raw_latent_shape", "timesteps", "is_cfg_negative"),
    },
    ("vllm-omni", f"{_V}/forward_context.py", "ForwardContext"): {
        *("denoise_step_idx", "denoise_timestep"),
    },
    ("vllm-omni", f"{_V}/data.py", "DiffusionCacheConfig"): {
        *("enable_taylorseer", "residual_diff_threshold"),
    },
}
# functions that must be there, without parameters
FUNCTIONS = {
    ("sglang", f"{_S}/distributed/parallel_state.py"): {
        *("get_ring_parallel_world_size", "get_tp_rank", "get_tp_world_size"),
        *("get_ulysses_parallel_rank", "get_ulysses_parallel_world_size"),
    },
    ("vllm-omni", f"{_V}/distributed/parallel_state.py"): {
        *("get_ring_parallel_world_size", "get_ulysses_parallel_rank"),
        "get_ulysses_parallel_world_size",
    },
}


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of `[B, N, H, D]`, as the hosts have it."""
    qkv = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*qkv, scale=scale).transpose(1, 2)


class Impl:
    """The dense implementation of both hosts; it counts its calls."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        self.softmax_scale, self.calls = softmax_scale, 0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None
    ) -> Tensor:
        self.calls += 1
        return dense(query, key, value, self.softmax_scale)

    def forward_into(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor | None, attn_metadata: Any
    ) -> bool:
        return True


class _Kind(enum.Enum):
    FA = "fa"
    SLIDING_TILE_ATTN = "sliding_tile_attn"

    @property
    def is_sparse(self) -> bool:
        return self is _Kind.SLIDING_TILE_ATTN


class Backend:
    @staticmethod
    def get_enum() -> _Kind:
        return _Kind.FA

    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type:
        return Impl


class SdpaBackend(Backend):
    """Another dense backend."""


class SparseBackend(Backend):
    @staticmethod
    def get_enum() -> _Kind:
        return _Kind.SLIDING_TILE_ATTN


@dataclass
class Request:
    """SGLang's `Req`: a dataclass that compares by value, so it can't be hashed."""

    raw_latent_shape: tuple[int, ...] | None
    timesteps: Tensor | None
    is_cfg_negative: bool = False


@dataclass
class VideoTokenLayout:
    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None
    used_len: int | None = None
    video_spans: tuple[Any, ...] = ()


@dataclass
class AttentionMetadata:
    attn_mask: Any = None
    joint_query: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    full_attn_spans: Any = None
    video_layout: VideoTokenLayout | None = None


@dataclass
class World:
    """What a host knows while it runs.

    Attributes:
        component: Name of the transformer that is built.
        context: The forward context.
        tp, ulysses, ring: This process' number and how many there are.
        hooks: What was registered.
    """

    component: str | None = None
    context: Any = None
    tp: tuple[int, int] = (0, 1)
    ulysses: tuple[int, int] = (0, 1)
    ring: tuple[int, int] = (0, 1)
    hooks: list[tuple[str, Callable[..., Any], Any]] = field(default_factory=list)
    overrides: dict[Any, str] = field(default_factory=dict)


def install_sglang(monkeypatch: Any, patch_size: Any = (1, 2, 2), num_layers: int = 2) -> World:
    """SGLang's modules in `sys.modules`."""
    world = World()
    package = "sglang.multimodal_gen.runtime"

    class HookType(enum.Enum):
        AFTER = "after"

    class HookRegistry:
        @classmethod
        def register(
            cls, target: str, hook: Any, hook_type: Any = HookType.AFTER, *, source: Any = None
        ) -> None:
            world.hooks.append((target, hook, hook_type))

    config = types.SimpleNamespace(patch_size=patch_size, num_layers=num_layers, patch_size_t=1)
    args = types.SimpleNamespace(pipeline_config=types.SimpleNamespace(dit_config=config))
    _module(
        monkeypatch, f"{package}.platforms.plugins", HookRegistry=HookRegistry, HookType=HookType
    )
    _module(
        monkeypatch,
        f"{package}.layers.attention.selector",
        get_component_attn_backend_name=lambda: world.component,
    )
    _module(
        monkeypatch,
        f"{package}.managers.forward_context",
        get_forward_context_or_none=lambda: world.context,
    )
    _module(monkeypatch, f"{package}.server_args", get_global_server_args=lambda: args)
    _module(
        monkeypatch,
        f"{package}.distributed.parallel_state",
        get_tp_rank=lambda: world.tp[0],
        get_tp_world_size=lambda: world.tp[1],
        **_parallel(world),
    )
    return world


def install_vllm_omni(monkeypatch: Any) -> World:
    """vLLM-Omni's modules, and what is used of vLLM, in `sys.modules`."""
    world = World()
    here = __name__

    class Member(enum.Enum):
        FLASH_ATTN = f"{here}.Backend"
        TORCH_SDPA = f"{here}.SdpaBackend"
        RAINFUSION_ATTN = f"{here}.SparseBackend"

        def get_path(self) -> str:
            return world.overrides.get(self, self.value)

        def is_overridden(self) -> bool:
            return self in world.overrides

    def register(backend: Any, class_path: str | None = None) -> None:
        world.overrides[backend] = str(class_path)

    _module(
        monkeypatch,
        "vllm_omni.diffusion.attention.backends.registry",
        DiffusionAttentionBackendEnum=Member,
        register_diffusion_backend=register,
    )
    _module(
        monkeypatch,
        "vllm_omni.diffusion.forward_context",
        get_forward_context=lambda: world.context,
        is_forward_context_available=lambda: world.context is not None,
    )
    _module(monkeypatch, "vllm_omni.diffusion.distributed.parallel_state", **_parallel(world))
    _module(
        monkeypatch,
        "vllm.distributed",
        get_tensor_model_parallel_rank=lambda: world.tp[0],
        get_tensor_model_parallel_world_size=lambda: world.tp[1],
    )
    return world


def _parallel(world: World) -> dict[str, Callable[[], int]]:
    return {
        "get_ulysses_parallel_rank": lambda: world.ulysses[0],
        "get_ulysses_parallel_world_size": lambda: world.ulysses[1],
        "get_ring_parallel_world_size": lambda: world.ring[1],
    }


def _module(monkeypatch: Any, path: str, **content: Any) -> None:
    """A module and the packages that it lies in."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if name not in sys.modules or depth == len(parts):
            module = types.ModuleType(name)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules[path]).update(content)
