"""Branch, run and step of forwards, in pipelines that name their guidance branches and that don't."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from sparse_dit.call import StepContext
from sparse_dit.integrations.diffusers import attach
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.integrations.step_tracker import StepTracker
from sparse_dit.patch import patch
from sparse_dit.plan import Stage
from tests.helpers.tiny_image_models import BUILDERS, generate
from tests.integrations.test_image_models import FAR, NARROW, Recorder, plan_for

# the host's own Chroma imports it from there
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
UNNAMED = pytest.mark.parametrize("name", ["chroma", "lumina"])
UNGUIDED = {"chroma": 0.0, "lumina": 1.0}
BRANCHES = ("cond", "uncond")
BATCHED, CHROMA = FAMILIES["LTXVideoTransformer3DModel"], FAMILIES["ChromaTransformer2DModel"]


def contexts(pipe, *calls):
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    for call in calls:
        generate(pipe, call)
    attachment.detach()
    seen = [c.context for c in recorder.calls if c.layer == recorder.calls[0].layer]
    return [(c.run, c.step, c.branch) for c in seen]


@UNNAMED
@pytest.mark.parametrize("steps", [1, 3])
def test_guidance_in_two_calls_without_names_is_one_step(name, steps):
    pipe, call = BUILDERS[name]()
    call = {**call, "num_inference_steps": steps}
    assert contexts(pipe, call, call) == [
        (run, step, branch) for run in range(2) for step in range(steps) for branch in BRANCHES
    ]
    call["guidance_scale"] = UNGUIDED[name]
    assert contexts(pipe, call, call) == [
        (run, step, "cond") for run in range(2) for step in range(steps)
    ]


def test_guidance_that_stops_early():
    pipe, call = BUILDERS["lumina"]()
    call = {**call, "num_inference_steps": 3, "cfg_trunc_ratio": 0.4}
    want = [(0, 0, "cond"), (0, 0, "uncond"), (0, 1, "cond"), (0, 2, "cond")]
    assert contexts(pipe, call) == want


@UNNAMED
def test_each_branch_runs_its_own_plan(name):
    pipe, call = BUILDERS[name]()
    stock = generate(pipe, call)
    plan = plan_for(pipe.transformer, NARROW)
    part = plan.components["transformer"]
    other = plan_for(pipe.transformer, FAR).components["transformer"]
    results = [stock]
    for stages, layers, want in (
        ((Stage(1.0, 0.0, "cond"),), (part,), {0: 2}),
        ((Stage(1.0, 0.0, "uncond"),), (other,), {0: 2}),
        (tuple(Stage(1.0, 0.0, b) for b in BRANCHES), (part, other), {0: 2, 1: 2}),
    ):
        both = replace(
            part,
            stages=stages,
            layers={n: tuple(heads for p in layers for heads in p.layers[n]) for n in part.layers},
        )
        with patch(pipe, replace(plan, components={"transformer": both})) as handle:
            results.append(generate(pipe, call))
        sparse = [r for r in handle.ran["transformer"] if r.dense_because is None]
        assert {r.stage: r.calls for r in sparse} == want
    assert len({r.sum().item() for r in results}) == 4
    assert torch.equal(generate(pipe, call), stock)


def walk(family, *forwards):
    """`(run, step, branch)` of forwards `(sigma, name, condition, latents)`."""
    tracker, context, got = StepTracker(), StepContext(), []
    for sigma, name, condition, latents in forwards:
        arguments = {"encoder_hidden_states": condition, "hidden_states": latents}
        branch, run, step = tracker.advance(context, family, arguments, sigma, name)
        context = StepContext(None, sigma, branch, run, step)
        got.append((run, step, branch))
    return got


def test_forwards_of_one_step_by_other_names_are_one_step():
    """A third and a fourth prediction: skipped layers, isolated modalities."""
    names = ("cond", "uncond", "uncond_stg", "uncond_modality")
    got = walk(BATCHED, *((s, n, None, None) for s in (0.9, 0.4) for n in names))
    branches = ("cond", "uncond", "any", "any")
    assert got == [(0, step, branch) for step in range(2) for branch in branches]


def test_without_names_step_and_run_are_told_by_latents_and_conditions():
    cond, uncond, noise, other = (torch.randn(2, 8) for _ in range(4))
    given = noise.clone()
    given[0, :3] = 0  # frames that a pipeline fixes in one branch alone
    half = noise.to(torch.bfloat16)
    steps = [(1, cond, noise), (1, uncond, given), (0.5, cond, half), (0.5, uncond, half.clone())]
    want = [(0, 0, "cond"), (0, 0, "uncond"), (0, 1, "cond"), (0, 1, "uncond")]
    assert walk(CHROMA, *((s, None, c, x) for s, c, x in steps)) == want
    assert walk(BATCHED, *((s, None, c, x) for s, c, x in steps)) == [
        (run, step, "any") for run, step, _ in want
    ]
    # one step, unguided, twice: other prompts, other noise
    assert walk(CHROMA, (1, None, cond, noise), (1, None, uncond, other)) == [
        (0, 0, "cond"),
        (1, 0, "cond"),
    ]
    # a scheduler that evaluates a noise level twice
    got = walk(CHROMA, *((s, None, cond, x) for s, x in ((1, noise), (0.5, other), (0.5, given))))
    assert got == [(0, 0, "cond"), (0, 1, "cond"), (0, 2, "cond")]


def test_without_names_a_third_prediction_with_the_prompt_is_one_of_its_step():
    cond, uncond, *noise = (torch.randn(2, 8) for _ in range(4))
    steps = [(0, cond), (0, uncond), (1, cond), (1, uncond), (1, cond)]
    got = walk(CHROMA, *((1 - n / 2, None, c, noise[n]) for n, c in steps))
    assert got == [(0, n, "cond" if c is cond else "uncond") for n, c in steps]


def test_copies_start_anew_and_hold_no_tensors():
    tracker = StepTracker()
    arguments = {"encoder_hidden_states": torch.ones(1), "hidden_states": torch.ones(1)}
    tracker.advance(StepContext(), CHROMA, arguments, 1.0, None)
    for twin in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):
        empty = StepTracker()
        assert vars(twin).pop("_schedule").pipe is vars(empty).pop("_schedule").pipe is None
        assert vars(twin) == vars(empty)
