"""Where a generation and its steps begin: told by the pipeline's scheduler, guessed where none is known."""

import copy
import functools
import pickle
from dataclasses import replace

import diffusers
import pytest
import torch

from sparse_dit.call import StepContext
from sparse_dit.integrations.diffusers import attach, attachment_of
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.integrations.step_tracker import StepTracker
from sparse_dit.patch import patch
from tests.helpers.tiny_pipelines import BUILDERS, generate, wan
from tests.integrations.test_diffusers_seam import Recorder
from tests.test_patch import NARROW, plan_for

HALF = replace(NARROW, every=2)


def places(pipe, *runs, told=True):
    """`(run, step)` of each forward's first layer over some runs."""
    seen = Recorder()
    attachment = attach(pipe.transformer, seen, pipe if told else None)
    for run in runs:
        run()
    attachment.detach()
    return [(c.context.run, c.context.step) for c in seen.calls if c.layer == seen.calls[0].layer]


@functools.cache
def server():
    """A Flux pipeline and `run(seed, sigmas)` on it, always with the same tensors of the prompt."""
    pipe, call = BUILDERS["flux"]()
    call = {k: v for k, v in call.items() if k not in ("prompt", "num_inference_steps")}
    prompt, pooled, _ = pipe.encode_prompt("a cat", None, max_sequence_length=16)

    def run(pipe, seed, sigmas, **more):
        given = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "sigmas": sigmas}
        noise = torch.Generator().manual_seed(seed)
        steps = {"num_inference_steps": len(sigmas), "generator": noise, "return_dict": False}
        return pipe(**given, **steps, **call, **more)[0]

    return pipe, run


def cancel(pipe, step, timestep, tensors):
    pipe._interrupt = True
    return {}


def fail(pipe, step, timestep, tensors):
    raise ConnectionError("the client is gone")


HOW = {"whole": None, "cancelled": cancel, "failed": fail}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("copied", [False, True])
def test_a_run_at_lower_noise_takes_nothing_from_the_one_before(how, copied):
    pipe, run = server()
    plan = plan_for(pipe, HALF)
    with patch(pipe, plan):
        want = run(pipe, 1, [0.6, 0.3])
    with patch(pipe, plan):
        used = copy.deepcopy(pipe) if copied else pipe
        try:
            run(used, 0, [1.0, 0.7], callback_on_step_end=how)
        except ConnectionError:
            assert how is fail
        assert torch.equal(run(used, 1, [0.6, 0.3]), want)


def test_another_pipeline_with_the_same_transformer_and_prompt_takes_nothing():
    """As `from_pipe` makes them, with the scheduler shared too."""
    pipe, run = server()
    plan, second = plan_for(pipe, HALF), type(pipe).from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    with patch(second, plan):
        want = run(second, 1, [0.6, 0.3])
    with patch(pipe, plan):
        run(pipe, 0, [1.0, 0.7], callback_on_step_end=cancel)
        assert torch.equal(run(second, 1, [0.6, 0.3]), want)


def test_a_loop_of_ones_own_says_where_a_generation_begins():
    pipe, run = server()
    plan = plan_for(pipe, HALF)
    with patch(pipe.transformer, plan):
        want = run(pipe, 1, [0.6, 0.3])
    with patch(pipe.transformer, plan) as handle:
        run(pipe, 0, [1.0, 0.7], callback_on_step_end=cancel)
        handle.begin_run()
        assert torch.equal(run(pipe, 1, [0.6, 0.3]), want)


def test_a_scheduler_that_is_replaced_is_asked_from_then_on():
    pipe, run = server()
    stock = pipe.scheduler
    with patch(pipe, plan_for(pipe, HALF)):
        want = run(pipe, 1, [0.6, 0.3])
        run(pipe, 0, [1.0, 0.7], callback_on_step_end=cancel)
        pipe.scheduler = type(stock).from_config(stock.config)
        got = run(pipe, 1, [0.6, 0.3])
        pipe.scheduler = stock
    assert torch.equal(got, want)


@pytest.mark.parametrize("told", [True, False])
def test_timesteps_that_are_rounded_to_one_value_are_steps_of_one_run(told):
    pipe, call = BUILDERS["hunyuan_video"]()
    pipe.to(torch.bfloat16)
    # the first two noise levels are 1 and .999, as with 50 steps at a shift of 17
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=200.0)
    run = functools.partial(generate, pipe, call, num_inference_steps=4)
    assert places(pipe, run, told=told) == [(0, step) for step in range(4)]
    plan = plan_for(pipe, HALF)
    with patch(pipe, plan) as handle:
        run()
        run()
        density = handle.summary().density
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        run()
    assert density == pytest.approx(handle.summary().density / 2)


def uncounted(kind):
    """A scheduler without `step_index`, and with what Wan's pipeline calls on it."""
    scheduler = kind()
    scheduler.set_begin_index, scheduler.sigmas = lambda index: None, [0.0] * 20
    return scheduler


OTHER = {"prediction_type": "v_prediction"}
SECOND_ORDER = {
    "Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "Heun, not flow": lambda: diffusers.HeunDiscreteScheduler(**OTHER),
    "KDPM2": lambda: diffusers.KDPM2DiscreteScheduler(**OTHER),
    "KDPM2 ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(**OTHER),
    "DPM": lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
    "PNDM": lambda: uncounted(diffusers.PNDMScheduler),
    "DDIM": lambda: uncounted(diffusers.DDIMScheduler),  # it doesn't count its steps
}


# the host's own schedulers warn of NumPy
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_schedulers_that_come_back_to_a_noise_level(scheduler, guidance):
    pipe, call = wan()
    pipe.scheduler = scheduler()
    run = functools.partial(generate, pipe, call, num_inference_steps=4, guidance_scale=guidance)
    run()
    forwards = len(pipe.scheduler.timesteps)
    want = [(n, step) for n in range(2) for step in range(forwards)]
    if guidance > 1:
        want = [place for place in want for _ in ("prompt", "other prompt")]
    assert places(pipe, run, run) == want


def test_nothing_is_taken_over_a_second_order_schedulers_runs():
    pipe, call = wan()
    pipe.scheduler = SECOND_ORDER["Heun"]()
    with patch(pipe, plan_for(pipe, HALF)) as handle:
        want = generate(pipe, call, num_inference_steps=3)
        half = handle.summary().density
        assert torch.equal(generate(pipe, call, num_inference_steps=3), want)
    with patch(pipe, plan_for(pipe, NARROW)) as handle:
        assert not torch.equal(generate(pipe, call, num_inference_steps=3), want)
    assert half == pytest.approx(handle.summary().density * 3 / 5)  # forwards 0, 2 and 4


def test_steps_that_rise_in_a_run_are_its_own():
    """As people's own timesteps may: only the scheduler tells that no other run begins."""
    pipe, call = wan()
    run = functools.partial(generate, pipe, call, guidance_scale=1.0, num_inference_steps=4)
    set_timesteps = pipe.scheduler.set_timesteps

    def there_and_back(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        sigmas = torch.tensor([1.0, 0.6, 0.8, 0.3, 0.0])
        pipe.scheduler.sigmas, pipe.scheduler.timesteps = sigmas, sigmas[:-1] * 1000

    pipe.scheduler.set_timesteps = there_and_back
    assert places(pipe, run, run) == [(n, step) for n in range(2) for step in range(4)]


def test_copies_know_their_own_pipeline_and_pickles_none():
    pipe, _ = wan()
    with patch(pipe, plan_for(pipe, HALF)):
        twin = copy.deepcopy(pipe)
        assert attachment_of(twin.transformer)._schedule.pipe is twin
        alone = copy.deepcopy(pipe.transformer)
        loaded = pickle.loads(pickle.dumps(pipe.transformer))
        assert attachment_of(alone)._schedule.pipe is attachment_of(loaded)._schedule.pipe is None
        held = attachment_of(pipe.transformer)._schedule
        assert held.pipe is pipe


def test_where_nothing_is_told_a_noise_level_met_again_gives_nothing_out():
    """A loop of one's own: a second-order scheduler, or a run that was cut off and another one."""
    tracker, context, prompt = StepTracker(), StepContext(), torch.ones(1)
    arguments = {"encoder_hidden_states": prompt, "hidden_states": torch.ones(1)}
    family, got = FAMILIES["WanTransformer3DModel"], []
    for sigma in (1.0, 1.0, 0.5, 0.5, 0.2):
        branch, run, step = tracker.advance(context, family, arguments, sigma, "cond")
        context = StepContext(None, sigma, branch, run, step, tracker.condition(arguments))
        got.append((run, step, context.condition))
    assert got == [(0, 0, 0), (0, 1, 1), (0, 2, 1), (0, 3, 2), (0, 4, 2)]
