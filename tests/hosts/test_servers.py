"""A plan in SGLang's and vLLM-Omni's attention layers: numbers, where it declines, and the contract."""

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.hosts import planned, sglang, vllm_omni
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, SlidingTile, Window
from sparse_dit.plan import HeadChoice, PlanError, Stage
from sparse_dit.step_cache import NAMED, StepCache
from tests.helpers import host_stand_ins as stand_ins
from tests.helpers.host_stand_ins import CONTRACTS, FIELDS, FUNCTIONS, Request
from tests.helpers.plan_cases import component, small
from tests.helpers.signatures import parameters

GRID = (3, 8, 8)
LATENT = (1, 16, 3, 16, 16)
TOKENS = math.prod(GRID)
HEADS, DIM = 4, 16
PATTERNS = [
    Pattern(Window(rows=0, columns=0), tile=(1, 4, 4), far=True),
    Pattern(Dense()),
    Pattern(SlidingTile(1, 1, 1), tile=(1, 4, 4)),
    Pattern(Window(frames=0), tile=(1, 8, 8)),
]
LAYER = "blocks.0.attn1"


def plan(**changes):
    sparse, dense = tuple(map(HeadChoice, PATTERNS)), (HeadChoice(Pattern(Dense())),) * HEADS
    values = {
        "layers": {LAYER: (dense, sparse)},
        "heads": {LAYER: (HEADS, DIM)},
        "layout": TokenLayout.video(*GRID),
        "valid_tokens": (0, None),
    }
    return small(components={"transformer": component(**(values | changes))})


@pytest.fixture(autouse=True)
def forgotten():
    yield
    planned._loaded.cache_clear()
    sglang._planned.cache_clear()
    vllm_omni._backend.cache_clear()


@pytest.fixture
def follow(tmp_path, monkeypatch):
    def write(wanted):
        wanted.save(tmp_path / "plan.json")
        monkeypatch.setenv(planned.PLAN, str(tmp_path / "plan.json"))

    return write


def qkv(tokens=TOKENS, heads=HEADS, seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, 2, tokens, heads, DIM).unbind()


def near(a, b):
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def wanted(q, k, v, layout, patterns=PATTERNS, used=None):
    index = build_index(list(patterns), layout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    more = {}
    if used is not None:
        more["row_stop"] = torch.full(q.shape[::2], used, dtype=torch.int32)
    return sparse_attention(q, k, v, index, backend="reference", **more).transpose(1, 2)


def sglang_layer(world, prefix=LAYER, component="transformer", heads=HEADS, **more):
    """A layer as SGLang builds it, behind what was registered."""
    ((target, hook, _),) = world.hooks
    assert target == sglang.SELECTOR
    backend = hook(stand_ins.Backend, DIM, torch.float32) or stand_ins.Backend
    world.component = component
    return backend.get_impl_cls()(
        num_heads=heads, head_size=DIM, softmax_scale=DIM**-0.5, causal=False, num_kv_heads=heads,
        prefix=f"{prefix}.impl", is_cross_attention=False, **more,
    )  # fmt: skip


def at(request, step=3):
    return types.SimpleNamespace(current_timestep=step, attn_metadata=None, forward_batch=request)


def request(**changes):
    values = {"raw_latent_shape": LATENT, "timesteps": torch.tensor([1000.0, 900.0, 700.0, 400.0])}
    return Request(**(values | changes))


def test_sglang_follows_the_plan(follow, monkeypatch):
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    sglang.register()
    layer, (q, k, v) = sglang_layer(world), qkv()
    world.context = at(request())
    out = layer.forward(q, k, v, None)
    near(out, wanted(q, k, v, TokenLayout.video(*GRID)))
    assert layer.calls == 0
    assert not layer.forward_into(q, k, v, None, None), "it would pass the plan by"
    world.context = at(request(), step=1)
    assert torch.equal(layer.forward(q, k, v, None), stand_ins.dense(q, k, v, DIM**-0.5))
    assert layer.calls == 1, "dense as planned is the host's own"


def test_a_process_computes_its_own_heads(follow, monkeypatch):
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    sglang.register()
    layer, (q, k, v) = sglang_layer(world, heads=2), qkv()
    world.context = at(request())
    expected = wanted(q, k, v, TokenLayout.video(*GRID))
    for number in range(2):
        world.ulysses = (number, 2)
        mine = slice(2 * number, 2 * number + 2)
        out = layer.forward(*(x[:, :, mine] for x in (q, k, v)), None)
        near(out, expected[:, :, mine])
    world.tp, world.ulysses = (1, 2), (1, 2)
    out = layer.forward(*(x[:, :, 3:] for x in (q, k, v)), None)
    near(out, expected[:, :, 3:])
    assert layer.calls == 0


def test_sglang_numbers_hunyuans_blocks_its_own_way(follow, monkeypatch):
    world = stand_ins.install_sglang(monkeypatch, patch_size=2, num_layers=20)
    names = {
        "Hunyuan.double_blocks.7.attn": "transformer_blocks.7.attn",
        "Hunyuan.single_blocks.23.attn": "single_transformer_blocks.3.attn",
        LAYER: LAYER,
    }
    assert {name: sglang.layer_of(f"{name}.impl") for name in names} == names
    sparse = (tuple(map(HeadChoice, PATTERNS)),)
    follow(
        plan(
            layers={"transformer_blocks.7.attn": sparse},
            heads={"transformer_blocks.7.attn": (HEADS, DIM)},
            stages=(Stage(1.0, 0.0),),
            layout=TokenLayout.video(*GRID, text_after=9),
        )
    )
    sglang.register()
    layer, (q, k, v) = sglang_layer(world, "Hunyuan.double_blocks.7.attn"), qkv(TOKENS + 5)
    world.context = at(request())
    layout = TokenLayout.video(*GRID, text_after=5)
    near(layer.forward(q, k, v, None), wanted(q, k, v, layout))


DECLINED = {
    "of no request": lambda world: setattr(world, "context", at(None)),
    "no raw_latent_shape": lambda w: setattr(w, "context", at(request(raw_latent_shape=None))),
    "no timesteps": lambda world: setattr(world, "context", at(request(timesteps=None))),
    "isn't among the request's 4": lambda w: setattr(w, "context", at(request(), step=4)),
    "aren't whole patches": lambda w: setattr(
        w, "context", at(request(raw_latent_shape=(1, 16, 3, 15, 16)))
    ),
    "doesn't say where": lambda w: setattr(
        w, "context", at(request(raw_latent_shape=(1, 16, 2, 16, 16)))
    ),
    "but a grid of": lambda w: setattr(
        w, "context", at(request(raw_latent_shape=(1, 16, 4, 16, 16)))
    ),
    "within 0 and 1": lambda w: setattr(
        w, "context", at(request(timesteps=torch.tensor([1.0, 2.0, 3.0, 4e6])))
    ),
}


@pytest.mark.parametrize("words", DECLINED)
def test_what_isnt_known_is_left_to_sglang_with_one_reason(words, follow, monkeypatch, caplog):
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    sglang.register()
    layer, (q, k, v) = sglang_layer(world), qkv()
    DECLINED[words](world)
    with caplog.at_level(logging.WARNING, "sparse_dit"):
        for _ in range(2):
            out = layer.forward(q, k, v, None)
            assert torch.equal(out, stand_ins.dense(q, k, v, DIM**-0.5))
    assert layer.calls == 2
    assert len(caplog.records) == 1 and words in caplog.text


def test_parts_of_sequences_and_of_heads_are_left_to_the_host(follow, monkeypatch, caplog):
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    sglang.register()
    layer, (q, k, v) = sglang_layer(world), qkv()
    world.context = at(request())
    layer.forward(q[:, :50], k, v, None)
    layer.forward(q[:, :, :1], k[:, :, :1], v[:, :, :1], None)
    world.ring = (0, 2)
    layer.forward(q[:, :, :1], k[:, :, :1], v[:, :, :1], None)
    assert layer.calls == 3
    for words in ("50 queries see", "1 heads in each of 1 processes", "ring attention"):
        assert words in caplog.text


def test_layers_that_the_plan_doesnt_name_are_the_hosts(follow, monkeypatch, caplog):
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    sglang.register()
    ((_, hook, _),) = world.hooks
    assert hook(stand_ins.SparseBackend, DIM, torch.float32) is None
    assert hook(stand_ins.Backend, DIM, torch.float32, is_cross_attention=True) is None
    other, (q, k, v) = sglang_layer(world, "model.layers.0.self_attn"), qkv()
    encoder = sglang_layer(world, "encoder.0", component="text_encoder")
    encoder.forward(q, k, v, None)
    assert not caplog.records
    other.forward(q, k, v, None)
    assert "names layers like 'blocks.0.attn1'" in caplog.text
    assert other.forward_into(q, k, v, None, None)


def test_without_a_plan_nothing_is_registered_and_a_wrong_one_is_told(monkeypatch):
    monkeypatch.delenv(planned.PLAN, raising=False)
    world, other = stand_ins.install_sglang(monkeypatch), stand_ins.install_vllm_omni(monkeypatch)
    sglang.register()
    vllm_omni.register()
    assert not world.hooks and not other.overrides
    monkeypatch.setenv(planned.PLAN, "/nowhere/plan.json")
    for host in (sglang, vllm_omni):
        with pytest.raises(PlanError):
            host.register()


@pytest.mark.parametrize("name", ["SPARSE_DIT_PLANS", "SPARSEDIT_PLAN", "sparse_dit_plan"])
def test_a_misspelt_name_of_the_variable_is_said(name, monkeypatch, caplog):
    stand_ins.install_sglang(monkeypatch)
    monkeypatch.delenv(planned.PLAN, raising=False)
    monkeypatch.setenv("SPARSE_DIT_CACHE", "elsewhere")
    sglang.register()
    assert not caplog.records
    monkeypatch.setenv(name, "tiny-wan")
    sglang.register()
    assert f"SGLang follows no plan: {name} is set, but not SPARSE_DIT_PLAN" in caplog.text


def omni_layer(world, name="FLASH_ATTN", **more):
    """A layer as vLLM-Omni builds it: the class by its path, keywords alone."""
    path = {member.name: path for member, path in world.overrides.items()}[name]
    module, _, own = path.rpartition(".")
    backend = getattr(importlib.import_module(module), own)
    assert backend.get_name() == "FLASH_ATTN"
    values = {
        "num_heads": HEADS, "head_size": DIM, "softmax_scale": DIM**-0.5, "causal": False,
        "num_kv_heads": HEADS, "qkv_layout": "BSND", "prefix": LAYER, "backend_kwargs": None,
        "role": "self", "backend_explicit": False,
    }  # fmt: skip
    return backend.get_impl_cls()(**(values | more))


def published(before=0, used=None, **more):
    layout = stand_ins.VideoTokenLayout(before, GRID, used)
    return stand_ins.AttentionMetadata(video_layout=layout, **more)


def omni_at(sigma=0.4, step=3):
    return types.SimpleNamespace(denoise_timestep=sigma, denoise_step_idx=step)


@pytest.mark.parametrize(("before", "padding"), [(0, 0), (7, 0), (0, 4), (7, 4)])
def test_vllm_omni_follows_the_plan(before, padding, follow, monkeypatch):
    follow(plan())
    world = stand_ins.install_vllm_omni(monkeypatch)
    vllm_omni.register()
    vllm_omni.register()
    assert {member.name for member in world.overrides} == {"FLASH_ATTN", "TORCH_SDPA"}
    world.context = type("Context", (), vars(omni_at()))()
    layer, (q, k, v) = omni_layer(world), qkv(before + TOKENS + padding)
    out = layer.forward(q, k, v, published(before))
    used = before + TOKENS
    layout = TokenLayout.video(*GRID, text_before=before, text_after=padding)
    expected = wanted(q, k, v, layout, used=used if padding else None)
    near(out[:, :used], expected[:, :used])
    assert layer.calls == 0


OMNI_DECLINED = {
    "no forward context": (None, published()),
    "doesn't publish its step": (omni_at(None), published()),
    "doesn't publish one video": (omni_at(), None),
    "second stream": (omni_at(), published(joint_query=1)),
    "several requests": (omni_at(), published(extra={"cu_seqlens_q": torch.arange(4)})),
    "9 keys are valid": (omni_at(), published(extra={"valid_kv_length": 9})),
}


@pytest.mark.parametrize("words", OMNI_DECLINED)
def test_what_isnt_known_is_left_to_vllm_omni_with_one_reason(words, follow, monkeypatch, caplog):
    follow(plan())
    world = stand_ins.install_vllm_omni(monkeypatch)
    vllm_omni.register()
    layer, (q, k, v) = omni_layer(world), qkv()
    context, metadata = OMNI_DECLINED[words]
    world.context = context and type("Context", (), vars(context))()
    for _ in range(2):
        out = layer.forward(q, k, v, metadata)
        assert torch.equal(out, stand_ins.dense(q, k, v, DIM**-0.5))
    assert layer.calls == 2
    assert len(caplog.records) == 1 and words in caplog.text


def test_a_plan_of_two_transformers_needs_to_know_which(follow, monkeypatch, caplog):
    part = plan().components["transformer"]
    follow(small(components={"transformer": part, "transformer_2": part}))
    world = stand_ins.install_vllm_omni(monkeypatch)
    vllm_omni.register()
    layer, (q, k, v) = omni_layer(world), qkv()
    layer.forward(q, k, v, published())
    assert layer.calls == 1 and "of which transformer" in caplog.text


def test_outputs_are_kept_within_a_generation_alone(follow, monkeypatch):
    kept = Pattern(SlidingTile(1, 1, 1), tile=(1, 4, 4), every=2)
    part = ((HeadChoice(kept),) * HEADS,)
    follow(plan(layers={LAYER: part}, stages=(Stage(1.0, 0.0),)))
    world = stand_ins.install_sglang(monkeypatch)
    sglang.register()
    layer = sglang_layer(world)
    first, second = request(), request()
    outs = []
    for number, (of, step) in enumerate([(first, 0), (first, 1), (first, 2), (second, 0)]):
        world.context = at(of, step)
        outs.append(layer.forward(*qkv(seed=number), None))
    assert torch.equal(outs[1], outs[0]), "the output of the step before"
    assert not torch.equal(outs[2], outs[1])
    assert not torch.equal(outs[3], outs[2])


SETTINGS = {
    "first-block": {
        "SGLang": "SGLANG_CACHE_DIT_ENABLED=true SGLANG_CACHE_DIT_RDT=0.12",
        "vLLM-Omni": """--cache-backend cache_dit --cache-config '{"residual_diff_threshold": 0.12}'""",
    },
    "taylorseer": {
        "SGLang": "SGLANG_CACHE_DIT_ENABLED=true SGLANG_CACHE_DIT_TAYLORSEER=true",
        "vLLM-Omni": """--cache-backend cache_dit --cache-config '{"enable_taylorseer": true}'""",
    },
}


@pytest.mark.parametrize(
    "cache",
    [
        StepCache("first-block", {"threshold": 0.12}),
        StepCache("taylorseer", {"interval": 2, "first": 3}),
    ],
    ids=str,
)
def test_a_step_cache_of_the_plan_is_said_to_be_the_hosts_once(cache, follow, monkeypatch, caplog):
    follow(replace(plan(), provenance={NAMED: cache.to_dict()}))
    world, other = stand_ins.install_sglang(monkeypatch), stand_ins.install_vllm_omni(monkeypatch)
    sglang.register()
    vllm_omni.register()
    assert not caplog.records, "a process without such layers needs to say nothing"
    for _ in range(2):
        sglang_layer(world)
        omni_layer(other)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    for message, (host, setting) in zip(said, SETTINGS[cache.name].items(), strict=True):
        assert f"step cache {cache}, which {host} doesn't take from a plan" in message
        assert message.endswith(setting)


def test_a_step_cache_that_isnt_known_is_told_before_anything_runs(follow, monkeypatch):
    follow(replace(plan(), provenance={NAMED: {"name": "another"}}))
    stand_ins.install_sglang(monkeypatch)
    with pytest.raises(PlanError, match="a step cache must be one of"):
        sglang.register()


def absent(package):
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} isn't installed"
    return None


def source(package, file):
    if reason := absent(package):
        pytest.skip(reason)
    path = importlib.metadata.distribution(package).locate_file(file)
    return ast.parse(path.read_text())


@pytest.mark.parametrize("contract", CONTRACTS, ids=[f"{c.package}:{c.name}" for c in CONTRACTS])
def test_signatures_are_the_packages_own(contract):
    tree = source(contract.package, contract.file)
    assert parameters(tree, contract.name) == contract.parameters


@pytest.mark.parametrize("place", FIELDS, ids=str)
def test_fields_are_the_packages_own(place):
    package, file, name = place
    assert set(parameters(source(package, file), name)) >= FIELDS[place]


@pytest.mark.parametrize("place", FUNCTIONS, ids=str)
def test_functions_are_the_packages_own(place):
    tree = source(*place)
    for name in FUNCTIONS[place]:
        assert parameters(tree, name) == ()


def test_settings_of_caches_are_the_packages_own():
    if reason := absent("sglang"):
        pytest.skip(reason)
    file = importlib.metadata.distribution("sglang").locate_file("sglang/multimodal_gen/envs.py")
    for name in ("ENABLED", "RDT", "TAYLORSEER"):
        assert f'"SGLANG_CACHE_DIT_{name}"' in file.read_text()


def test_dense_backends_are_the_packages_own():
    tree = source("vllm-omni", "vllm_omni/diffusion/attention/backends/registry.py")
    (found,) = (n for n in tree.body if getattr(n, "name", "") == "DiffusionAttentionBackendEnum")
    names = {n.targets[0].id for n in found.body if isinstance(n, ast.Assign)}
    assert names - set(vllm_omni.DENSE) == {"FASTVIDEO_VSA", "RAINFUSION_ATTN"}


@pytest.fixture
def run_source(monkeypatch):
    """Runs one of a package's own files as a module by itself, under a name if it is to be imported."""

    def run(package, file, name=None):
        source(package, file)
        path = importlib.metadata.distribution(package).locate_file(file)
        spec = importlib.util.spec_from_file_location(name or path.stem, path)
        module = importlib.util.module_from_spec(spec)
        if name is not None:
            monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return run


def test_sglangs_own_sdpa_backend_follows_the_plan(follow, monkeypatch, run_source):
    """Its base classes and its SDPA backend run on a CPU, with stand-ins of a logger and an enum."""
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    package = "sglang.multimodal_gen.runtime"
    kinds = types.SimpleNamespace(TORCH_SDPA=types.SimpleNamespace(is_sparse=False))
    stand_ins._module(
        monkeypatch, "sglang.kernels.kernel_api_logging",
        wrap_method_with_debug_kernel_once=lambda impl, *args, **kwargs: impl,
    )  # fmt: skip
    stand_ins._module(monkeypatch, f"{package}.platforms", AttentionBackendEnum=kinds)
    stand_ins._module(monkeypatch, f"{package}.utils.logging_utils", init_logger=logging.getLogger)
    found = None
    for name in ("attention_backend", "sdpa"):
        path = f"{package}.layers.attention.backends.{name}"
        found = run_source("sglang", f"{path.replace('.', '/')}.py", path)
    backend = sglang.chosen(found.SDPABackend, DIM, torch.float32, is_cross_attention=False)
    assert issubclass(backend, found.SDPABackend)
    assert backend.supports_packed_varlen() == found.SDPABackend.supports_packed_varlen()
    world.component = "transformer"
    layer = backend.get_impl_cls()(
        num_heads=HEADS, head_size=DIM, causal=False, softmax_scale=DIM**-0.5,
        num_kv_heads=HEADS, prefix=f"{LAYER}.impl", is_cross_attention=False,
    )  # fmt: skip
    q, k, v = qkv()
    world.context = at(request())
    near(layer.forward(q, k, v, None), wanted(q, k, v, TokenLayout.video(*GRID)))
    world.context = at(request(), step=0)
    assert torch.equal(layer.forward(q, k, v, None), stand_ins.dense(q, k, v, DIM**-0.5))


def test_vllm_omnis_own_sdpa_backend_follows_the_plan(follow, monkeypatch, run_source):
    """Its base classes and its SDPA backend run on a CPU that says it is a GPU."""
    follow(plan())
    world = stand_ins.install_vllm_omni(monkeypatch)
    package = "vllm_omni.diffusion.attention.backends"
    platform = types.SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: True)
    stand_ins._module(monkeypatch, "vllm.logger", init_logger=logging.getLogger)
    stand_ins._module(monkeypatch, "vllm_omni.platforms", current_omni_platform=platform)
    stand_ins._module(
        monkeypatch,
        f"{package}.utils.attn_runtime_selector",
        can_sdpa_use_fused_gqa=lambda *args: True,
    )
    found = {}
    for name in ("abstract", "sdpa"):
        path = f"{package}.{name}"
        found[name] = run_source("vllm-omni", f"{path.replace('.', '/')}.py", path)
    member = types.SimpleNamespace(value=f"{package}.sdpa.SDPABackend")
    registry = importlib.import_module(f"{package}.registry")
    registry.DiffusionAttentionBackendEnum = types.SimpleNamespace(
        __members__={"TORCH_SDPA": member}
    )
    backend, abstract = vllm_omni.TORCH_SDPA, found["abstract"]
    assert issubclass(backend, found["sdpa"].SDPABackend)
    layer = backend.get_impl_cls()(
        num_heads=HEADS, head_size=DIM, softmax_scale=DIM**-0.5, causal=False, num_kv_heads=HEADS,
        qkv_layout="BSND", prefix=LAYER, backend_kwargs=None, role="self", backend_explicit=False,
    )  # fmt: skip
    layout = abstract.VideoTokenLayout(prefix_len=0, latent_grid=GRID, used_len=TOKENS)
    mask = torch.arange(TOKENS + 6).expand(2, -1) < TOKENS
    metadata = abstract.AttentionMetadata(attn_mask=mask, video_layout=layout)
    q, k, v = qkv(TOKENS + 6)
    world.context = type("Context", (), vars(omni_at()))()
    out = layer.forward(q, k, v, metadata)
    expected = wanted(q, k, v, TokenLayout.video(*GRID, text_after=6), used=TOKENS)
    near(out[:, :TOKENS], expected[:, :TOKENS])
    world.context.denoise_timestep = 0.9
    dense = stand_ins.dense(q[:, :TOKENS], k[:, :TOKENS], v[:, :TOKENS], DIM**-0.5)
    near(layer.forward(q, k, v, metadata)[:, :TOKENS], dense)


def test_sglangs_own_hooks_put_ours_in(follow, monkeypatch, run_source):
    """Its registry of hooks runs without a GPU; what it hooks here is a stand-in of the selector."""
    hooks = run_source("sglang", "sglang/srt/plugins/hook_registry.py")
    follow(plan())
    world = stand_ins.install_sglang(monkeypatch)
    importer = types.ModuleType("importer_of_the_selector")
    selector = importlib.import_module(sglang.SELECTOR.rpartition(".")[0])
    selector.get_attn_backend = importer.get_attn_backend = lambda *args, **kwargs: (
        stand_ins.SparseBackend if args[0] == 64 else stand_ins.Backend
    )
    monkeypatch.setitem(sys.modules, importer.__name__, importer)
    plugins = importlib.import_module("sglang.multimodal_gen.runtime.platforms.plugins")
    plugins.HookRegistry, plugins.HookType = hooks.HookRegistry, hooks.HookType
    sglang.register()
    hooks.HookRegistry.apply_hooks()
    assert importer.get_attn_backend(64, torch.float32) is stand_ins.SparseBackend
    cross = importer.get_attn_backend(16, torch.float32, is_cross_attention=True)
    assert cross is stand_ins.Backend
    found = importer.get_attn_backend(16, torch.float32, is_cross_attention=False)
    assert issubclass(found, stand_ins.Backend) and found is not stand_ins.Backend
    assert importer.get_attn_backend(16, torch.float32) is found
    assert not world.hooks


def test_vllm_omnis_own_registry_leads_to_ours(follow, monkeypatch, run_source):
    """Its registry runs with a stand-in of two of vLLM's helpers."""
    follow(plan())
    stand_ins.install_vllm_omni(monkeypatch)
    vllm = {"logger": {"init_logger": logging.getLogger}, "utils": {}, "utils.import_utils": {}}
    vllm["utils.import_utils"]["resolve_obj_by_qualname"] = lambda name: getattr(
        importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]
    )
    for name, content in vllm.items():
        stand_ins._module(monkeypatch, f"vllm.{name}", **content)
    name = "vllm_omni.diffusion.attention.backends.registry"
    registry = run_source("vllm-omni", f"{name.replace('.', '/')}.py")
    monkeypatch.setitem(sys.modules, name, registry)
    own = types.ModuleType("vllm_omni.diffusion.attention.backends.sdpa")
    own.SDPABackend = stand_ins.Backend
    monkeypatch.setitem(sys.modules, own.__name__, own)
    vllm_omni.register()
    members = registry.DiffusionAttentionBackendEnum
    assert issubclass(members.TORCH_SDPA.get_class(), stand_ins.Backend)
    assert members.TORCH_SDPA.get_class() is not stand_ins.Backend
    assert members.TORCH_SDPA.get_class() is members.TORCH_SDPA.get_class()
    assert not members.FASTVIDEO_VSA.is_overridden()


@pytest.mark.parametrize("name", ["__init__", "forward", "forward_into"])
def test_the_stand_in_has_the_signatures_of_the_contract(name):
    (contract,) = (
        c for c in CONTRACTS if (c.package, c.name) == ("sglang", f"AttentionImpl.{name}")
    )
    code = getattr(stand_ins.Impl, name).__code__
    assert code.co_varnames[1 : code.co_argcount] == contract.parameters
