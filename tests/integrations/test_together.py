"""A patched pipeline compiled, beside another one, in threads, and in what people build around it."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import diffusers
import peft
import pytest
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_dit import cli
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import processors, traced
from sparse_dit.integrations.diffusers import (
    attach,
    attachment_of,
    components,
    self_attention_layers,
)
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import patch, unpatch
from sparse_dit.plan import Stage
from sparse_dit.search.check import check_plan
from tests.helpers import tiny_image_models as image_models
from tests.helpers.eval_cases import WINDOW, uniform_plan
from tests.helpers.tiny_pipelines import BUILDERS, generate, wan
from tests.helpers.tiny_video_pipelines import PIPELINES as VIDEO_PIPELINES
from tests.integrations.test_combinations import drift, fresh, lora
from tests.integrations.test_video_models import Recorder
from tests.search.test_check import _with_errors
from tests.test_patch import DENSE, FAR, NARROW, plan_for

HALVES = (Stage(1.0, 0.5), Stage(0.5, 0.0))


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.cache
def _layers(family):
    """More layers of a kind than torch compiles variants of a function."""
    return wan(num_layers=10) if family == "wan" else BUILDERS[family]()


def compile_blocks(pipe, counter):
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)


def compile_whole(pipe, counter):
    pipe.transformer.compile(backend=counter, fullgraph=True)


def wrap_whole(pipe, counter):
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)


@pytest.mark.parametrize(
    ("family", "how", "backend"),
    [
        ("wan", compile_blocks, "aot_eager"),
        ("wan", compile_blocks, "eager"),
        ("hunyuan_video", wrap_whole, "eager"),
        ("cogvideox", compile_whole, "aot_eager"),
    ],
)
def test_one_graph_over_layers_stages_and_runs(family, how, backend):
    pipe, call = _layers(family)
    pipe = copy.deepcopy(pipe)
    stock = generate(pipe, call)
    plan = plan_for(pipe, FAR, DENSE, stages=HALVES)
    with patch(pipe, plan) as handle:
        want = generate(pipe, call)
        sparse = handle.summary().sparse_calls
    counter = CompileCounterWithBackend(backend)
    handle = patch(pipe, plan)
    how(pipe, counter)
    for run in range(1, 3):
        torch.testing.assert_close(generate(pipe, call), want, rtol=1e-5, atol=1e-5)
        assert handle.summary().sparse_calls == run * sparse > 0
    assert counter.frame_count == 1
    handle.remove()
    torch.testing.assert_close(generate(pipe, call), stock, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2  # the stock processors'
    with patch(pipe, plan):
        torch.testing.assert_close(generate(pipe, call), want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2  # the first graph again


@pytest.mark.parametrize("how", [compile_blocks, compile_whole, wrap_whole])
def test_compiled_first_then_patched(how):
    pipe, call = copy.deepcopy(_layers("wan")) if how is compile_blocks else wan()
    plan = plan_for(pipe, FAR, NARROW, stages=HALVES)
    with patch(pipe, plan):
        want = generate(pipe, call)
    counter = CompileCounterWithBackend("eager")
    how(pipe, counter)
    stock = generate(pipe, call)
    assert counter.frame_count == 1
    with patch(pipe, plan) as handle:
        assert torch.equal(generate(pipe, call), want)
        assert handle.summary().dense_calls == 0
    assert counter.frame_count == 2
    assert torch.equal(generate(pipe, call), stock)
    assert counter.frame_count == 2


@pytest.mark.fresh
@pytest.mark.parametrize(
    ("how", "patched_first"), [(compile_blocks, True), (compile_whole, False), (wrap_whole, True)]
)
def test_the_very_first_patched_forward_may_be_a_compiled_one(how, patched_first):
    """In each layer with its own plan; a second thread then runs the same code."""
    pipe, call = wan()
    call |= {"num_inference_steps": 1, "guidance_scale": 1.0}
    plan = plan_for(pipe, FAR)
    part, last = plan.components["transformer"], "blocks.1.attn1"
    narrow = plan_for(pipe, NARROW).components["transformer"].layers[last]
    layers = part.layers | {last: narrow}
    plan = replace(plan, components={"transformer": replace(part, layers=layers)})
    twin = copy.deepcopy(pipe)
    handle = patch(pipe, plan) if patched_first else None
    how(pipe, "eager")
    handle = handle or patch(pipe, plan)
    got = [generate(pipe, call)]
    with ThreadPoolExecutor(1) as pool:
        got.append(pool.submit(generate, pipe, call).result())
    assert {ran.layer: ran.calls for ran in handle.ran["transformer"]} == dict.fromkeys(layers, 2)
    with patch(twin, plan):
        want = generate(twin, call)
    assert torch.equal(got[0], want) and torch.equal(got[1], want)


@pytest.mark.fresh
def test_a_graph_that_breaks_at_attention_finds_its_layer(monkeypatch):
    """The layer is then looked up in a frame of its own, which is compiled too."""
    pipe, call = wan()
    call |= {"num_inference_steps": 1, "guidance_scale": 1.0}
    monkeypatch.setattr(processors, "traceable", lambda options: False)
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        pipe.transformer.compile_repeated_blocks(backend="eager")
        generate(pipe, call)
        calls = {ran.layer: ran.calls for ran in handle.ran["transformer"]}
    assert calls == dict.fromkeys(self_attention_layers(pipe.transformer), 1)


@pytest.mark.fresh
def test_a_compiled_block_of_a_dense_plan_is_bit_equal_to_stock():
    pipe, call = wan()
    stock = generate(pipe, call)
    with patch(pipe, plan_for(pipe, DENSE)) as handle:
        compile_blocks(pipe, "aot_eager")
        assert torch.equal(generate(pipe, call), stock)
        assert handle.summary().dense_calls == 8


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_operator_is_a_good_citizen(heads_first):
    class Layer:
        def attend(self, args, kwargs):
            return args[0] * kwargs["scale"]

    layer = Layer()
    q = torch.randn(2, 3, 4, 8)
    arguments = (
        traced.handle_of(layer), q, q, q, None, 0.0, False, 0.5, False, None, heads_first
    )  # fmt: skip
    assert torch.equal(torch.ops.sparse_dit.seam(*arguments), q * 0.5)
    torch.library.opcheck(torch.ops.sparse_dit.seam.default, arguments)
    out = torch.ops.sparse_dit.seam(*arguments[:1], q.clone().requires_grad_(), *arguments[2:])
    with pytest.raises(NotImplementedError, match=r"no gradient; call it under torch.no_grad"):
        out.sum().backward()
    del layer
    with pytest.raises(RuntimeError, match=r"that was deleted; compile the new one"):
        torch.ops.sparse_dit.seam(*arguments)


def test_what_the_operator_can_not_hand_on():
    mask = torch.ones(1, 4)
    assert traced.traceable({"attn_mask": mask, "scale": 0.5, "parallel_config": None})
    assert not traced.traceable({"parallel_config": object()})
    assert not traced.traceable({"attn_mask": object()})


def test_two_patched_pipelines_interleaved_and_in_threads():
    pipes = [fresh(family) for family in ("wan", "wan", "flux")]
    plans = [plan_for(pipes[0][0], NARROW), plan_for(pipes[1][0], FAR, DENSE)]
    plans.append(plan_for(pipes[2][0], FAR))
    want = []
    for (pipe, call), plan in zip(pipes, plans, strict=True):
        with patch(pipe, plan):
            want.append(generate(pipe, call))
    assert not torch.equal(want[0], want[1])
    handles = [patch(pipe, plan) for (pipe, _), plan in zip(pipes, plans, strict=True)]

    def step_of_another(pipe, step, timestep, values):
        if step == 1:
            other, call = pipes[1]
            assert torch.equal(generate(other, call), want[1])
        return values

    pipe, call = pipes[0]
    assert torch.equal(generate(pipe, call, callback_on_step_end=step_of_another), want[0])
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            got = pool.map(lambda each: generate(*each), pipes)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    calls = [handle.summary() for handle in handles]
    assert [s.dense_calls for s in calls] == [0, 0, 0]
    assert [s.sparse_calls for s in calls] == [3 * 16, 3 * 16, 2 * 8]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# model, its scheduler or None for its own, what its call is given, forwards of a run
SCHEDULES = {
    "1 step": ("wan", None, {"num_inference_steps": 1}, 1),
    "4 steps": ("wan", None, {"num_inference_steps": 4}, 4),
    "8 steps": ("wan", None, {"num_inference_steps": 8}, 8),
    "UniPC": ("wan", diffusers.UniPCMultistepScheduler(**FLOW), {"num_inference_steps": 5}, 5),
    "DPM++": ("wan", diffusers.DPMSolverMultistepScheduler(**FLOW), {"num_inference_steps": 5}, 5),
    # the same noise level twice, but at the end
    "Heun": ("wan", diffusers.FlowMatchHeunDiscreteScheduler(), {"num_inference_steps": 3}, 5),
    "flow LCM": ("wan", diffusers.FlowMatchLCMScheduler(shift=5.0), {"num_inference_steps": 4}, 4),
    "LCM": ("pixart", diffusers.LCMScheduler(), {"num_inference_steps": 4}, 4),
    "DMD": ("pixart", diffusers.LCMScheduler(), {"timesteps": [999, 749, 499, 249]}, 4),
    "DPM of CogVideoX": ("cogvideox", diffusers.CogVideoXDPMScheduler(), {}, 2),
    # of the model's own card
    "LTX distilled": (
        "ltx_condition",
        None,
        {"timesteps": [1000, 993, 987, 981, 975, 909, 725, 0.03]},
        8,
    ),
    "given sigmas": ("flux", None, {"sigmas": [1.0, 0.75, 0.5, 0.25]}, 4),
}


def seeded(pipe, call):
    torch.manual_seed(0)  # Wan gives its scheduler no generator
    return generate(pipe, call)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # schedulers give numpy tensors
def test_any_schedule_is_followed_by_sigma_and_not_by_a_count_of_steps(name):
    family, scheduler, given, forwards = SCHEDULES[name]
    pipe, call = (BUILDERS | image_models.BUILDERS | VIDEO_PIPELINES)[family]()
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {**call, "guidance_scale": 1.0, **given}
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"].max().item()), with_kwargs=True
    )
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    stock = [seeded(pipe, call) for _ in range(2)]
    attachment.detach()
    layers = len(self_attention_layers(pipe.transformer))
    told = [c.context for c in recorder.calls[::layers]]
    levels = [t if family == "flux" else t / 1000 for t in seen]
    assert [c.sigma for c in told] == pytest.approx(levels)
    assert [(c.run, c.step) for c in told] == [(r, s) for r in range(2) for s in range(forwards)]
    with patch(pipe, plan_for(pipe, NARROW, stages=HALVES)) as handle:
        first, second = seeded(pipe, call), seeded(pipe, call)
    hook.remove()
    assert torch.equal(first, second) and torch.equal(*stock)
    assert 0 < drift(first, stock[0]) < 0.5
    high = layers * sum(sigma > 0.5 for sigma in levels)
    ran = {s.stage: s.sparse_calls for s in handle.summary().stages}
    assert ran["progress 1 to 0.5"] == high
    assert ran["progress 0.5 to 0"] == layers * 2 * forwards - high
    assert handle.summary().dense_calls == 0


def test_branches_with_plans_of_their_own_run_their_own():
    pipe, call = wan()
    stock = generate(pipe, call)
    cond = plan_for(pipe, NARROW, stages=(Stage(1.0, 0.0, "cond"),))
    uncond = plan_for(pipe, FAR, stages=(Stage(1.0, 0.0, "uncond"),))
    results = []
    for plan in (cond, uncond, _merged(cond, uncond)):
        with patch(pipe, plan) as handle:
            results.append(generate(pipe, call))
    assert {s.stage: s.sparse_calls for s in handle.summary().stages} == {
        "progress 1 to 0, cond": 4,
        "progress 1 to 0, uncond": 4,
    }
    assert len({r.sum().item() for r in (*results, stock)}) == 4
    guided = {**call, "guidance_scale": 1.0}
    with patch(pipe, uncond) as handle:
        assert torch.equal(generate(pipe, guided), _stock_of(pipe, guided))
    assert handle.summary().sparse_calls == 0


def _stock_of(pipe, call):
    unpatch(pipe)
    return generate(pipe, call)


def _merged(*plans):
    parts = [plan.components["transformer"] for plan in plans]
    whole = replace(
        parts[0],
        stages=tuple(stage for part in parts for stage in part.stages),
        layers={
            name: tuple(heads for part in parts for heads in part.layers[name])
            for name in parts[0].layers
        },
    )
    return replace(plans[0], components={"transformer": whole})


def _image_adapter(transformer):
    torch.manual_seed(3)
    text, hidden = transformer.config.joint_attention_dim, transformer.inner_dim
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(4 * text, 16),
            "proj.bias": torch.randn(4 * text),
            "norm.weight": torch.ones(text),
            "norm.bias": torch.zeros(text),
        },
        "ip_adapter": {
            f"0.to_{name}_ip.{kind}": torch.randn(hidden, text)[:, : None if wide else 1].squeeze(1)
            for name in "kv"
            for kind, wide in (("weight", True), ("bias", False))
        },
    }
    transformer._load_ip_adapter_weights([weights])


def _image_prompt():
    embeds = [torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))]
    return {"ip_adapter_image_embeds": embeds, "negative_ip_adapter_image_embeds": embeds}


def test_an_image_adapter_is_loaded_first():
    pipe, call = BUILDERS["flux"]()
    stock = generate(pipe, call)
    _image_adapter(pipe.transformer)
    call = {**call, **_image_prompt()}
    adapted = generate(pipe, call)
    assert not torch.equal(adapted, stock)
    keys = set(pipe.transformer.state_dict())
    with patch(pipe, plan_for(pipe, DENSE)):
        assert torch.equal(generate(pipe, call), adapted)
    with patch(pipe, plan_for(pipe, FAR)) as handle:
        sparse = generate(pipe, call)
        assert set(pipe.transformer.state_dict()) == keys
        twin = copy.deepcopy(pipe)
        assert torch.equal(generate(twin, call), sparse)
    assert 0 < drift(sparse, adapted) < 0.3
    assert handle.summary().dense_calls == 0
    assert torch.equal(generate(pipe, call), adapted)


def test_an_image_adapter_loaded_or_unloaded_after_patching_is_told_and_runs_stock(caplog):
    pipe, call = BUILDERS["flux"]()
    stock = generate(pipe, call)
    handle = patch(pipe, plan_for(pipe, FAR))
    _image_adapter(pipe.transformer)
    adapted = generate(pipe, {**call, **_image_prompt()})
    assert handle.summary().lost == {
        "transformer": tuple(sorted(self_attention_layers(pipe.transformer)))
    }
    assert "were replaced after patching" in caplog.text
    handle.remove()
    assert torch.equal(generate(pipe, {**call, **_image_prompt()}), adapted)
    handle = patch(pipe, plan_for(pipe, FAR))
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe, call), stock)
    assert len(handle.summary().lost["transformer"]) == 2
    unpatch(pipe)
    assert torch.equal(generate(pipe, call), stock)


def test_a_modular_pipeline():
    pipe, call = wan()
    modular = WanCoreDenoiseStep().init_pipeline()
    modular.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler)
    inputs = {k: call[k] for k in ("height", "width", "num_frames", "num_inference_steps")}
    text = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(2))
    inputs |= {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}

    def run():
        return modular(**inputs, generator=torch.Generator().manual_seed(0), output="latents")

    stock = run()
    assert components(modular) == {"transformer": pipe.transformer}
    with patch(modular, plan_for(pipe, DENSE)):
        assert torch.equal(run(), stock)
    with patch(modular, plan_for(pipe, NARROW)) as handle:
        sparse = run()
    assert 0 < drift(sparse, stock) < 0.3
    assert handle.summary().sparse_calls == 8
    assert torch.equal(run(), stock)


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "hunyuan_video"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_cache_dit_beside_it(family):
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    pipe, call = BUILDERS[family]()
    call = {**call, "num_inference_steps": 6}

    def enable(pipe):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=1,
            residual_diff_threshold=10.0,
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    cached = copy.deepcopy(pipe)
    enable(cached)
    alone = generate(cached, call)
    for patterns in ((DENSE,), (FAR, NARROW)):
        plan = plan_for(pipe, *patterns)
        with patch(cached, plan):
            last = generate(cached, call)
        assert torch.equal(generate(cached, call), alone)
        first = copy.deepcopy(pipe)
        handle = patch(first, plan)
        enable(first)
        assert torch.equal(generate(first, call), last)
        assert torch.equal(last, alone) == (patterns == (DENSE,))
        handle.remove()
        assert torch.equal(generate(first, call), alone)
    assert drift(last, alone) < 0.3


def test_check_scores_a_plan_with_the_lora_that_is_given(tmp_path, monkeypatch, capsys):
    """The plan's errors were measured with the LoRA; without it the heads err more."""
    pipe, _ = wan()
    tuned = copy.deepcopy(pipe)
    lora(tuned)
    with torch.no_grad():
        for name, parameter in tuned.transformer.named_parameters():
            if "lora_B" in name:
                parameter.mul_(10)
    settings = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
    plan = uniform_plan(tuned, WINDOW, TokenLayout.video(5, 4, 4))
    cases = {"calibration": [{"prompt": "a dog", "seed": 1}]}
    record = {"errors_behind_projection": True, "settings": settings.to_dict(), "cases": cases}
    plan = replace(plan, provenance=record | {"profile_steps": 4})
    found = check_plan(tuned, plan, Case("a dog", 1), settings)
    plan = _with_errors(plan, {(h.layer, h.stage, h.head): h.now for h in found.heads})
    monkeypatch.chdir(tmp_path)
    plan.save("plan.json")
    pipe.save_pretrained("model")
    transformer = tuned.transformer
    weights = peft.get_peft_model_state_dict(transformer, adapter_name="style")
    type(pipe).save_lora_weights(
        ".", transformer_lora_layers=weights, weight_name="lora.safetensors"
    )
    transformer.save_lora_adapter(".", adapter_name="style", weight_name="nameless.safetensors")
    assert check_plan(pipe, plan, Case("a dog", 1), settings).left
    tuned.transformer.delete_adapters("style")
    assert check_plan(tuned, plan, Case("a dog", 1), settings).left
    assert cli.run(["check", "model", "plan.json"]) == 1
    assert "search a new plan" in capsys.readouterr().err
    command = ["check", "model", "plan.json", "--lora", "lora.safetensors"]
    assert cli.run(command) == 0, capsys.readouterr().err
    assert cli.run([*command[:-1], "nameless.safetensors"]) == 2
    assert "must hold weights for WanPipeline's transformer" in capsys.readouterr().err


def test_a_failure_half_way_through_attaching_restores_stock(monkeypatch):
    pipe, call = wan()
    stock = generate(pipe, call)
    layers = self_attention_layers(pipe.transformer)
    before = [layer.processor for layer in layers.values()]
    last = layers["blocks.1.attn1"]

    def refuse(processor):
        raise RuntimeError("no other processor, please")

    monkeypatch.setattr(last, "set_processor", refuse, raising=False)
    with pytest.raises(RuntimeError, match="no other processor"):
        patch(pipe, plan_for(pipe, NARROW))
    monkeypatch.undo()
    assert attachment_of(pipe.transformer) is None
    assert [layer.processor for layer in layers.values()] == before
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.fresh
def test_compiled_and_patched_pipelines_copy_and_pickle_their_own_handles():
    pipe, call = wan()
    with patch(pipe, plan_for(pipe, NARROW)):
        want = generate(pipe, call)
        twin = copy.deepcopy(pipe)
        loaded = pickle.loads(pickle.dumps(pipe.transformer))
        seams = [
            layer.processor._sparse_dit_seam
            for part in (pipe.transformer, twin.transformer, loaded)
            for layer in self_attention_layers(part).values()
        ]
    assert len({int(seam.handle) for seam in seams}) == len(seams)
    compile_blocks(twin, "eager")
    assert torch.equal(generate(twin, call), want)
    assert attachment_of(twin.transformer).intercept.ran
    assert not attachment_of(loaded).intercept.ran
