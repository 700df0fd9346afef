"""MiniMax-H3: where its video lies in a packed sequence, and its modular pipelines searched and patched."""

import functools
import json
import math
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3Blocks,
    MiniMaxH3FL2VACoreDenoiseStep,
    MiniMaxH3Ref2VACoreDenoiseStep,
)
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.inputs import load_pipeline
from sparse_dit.integrations import workload
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patch import patch
from sparse_dit.search import search_plan
from sparse_dit.search.starting import geometric_plan
from tests.helpers.search_cases import accounts, stub_costs
from tests.helpers.tiny_minimax import Processor, minimax_h3
from tests.helpers.tiny_pipelines import generate
from tests.helpers.tiny_video_models import BUILDERS, randn
from tests.integrations.test_video_models import NARROW, drift, plan_for

pytestmark = pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
LAYERS = {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
SETTINGS = GenerationSettings(64, 64, 124, steps=3, guidance=1.0)
FRAMES, SOUND = 37, 2 * 207  # of 124 frames of video
LAYOUT = FAMILIES["MiniMaxH3Transformer3DModel"].layout


def _frames(times, rows=2, columns=3, across=0.0):
    """Positions of frames in raster order `[N, 3]`."""
    axes = torch.tensor(times), torch.arange(rows) * 8, torch.arange(columns) * 8
    return torch.cartesian_prod(*(axis.double() for axis in axes)) + torch.tensor(
        [0.0, 0.0, across]
    )


def _text(tokens):
    return torch.stack([torch.arange(tokens).double(), *torch.zeros(2, tokens).double()], 1)


def _read(*parts):
    """The layout of a sequence of parts, each `(positions, whether it is video)`."""
    positions = torch.cat([part for part, _ in parts])
    video = torch.cat([torch.full((len(part),), is_video) for part, is_video in parts])
    indices = video.nonzero().flatten()
    return LAYOUT(None, {"position_ids": positions, "video_indices": indices})


VIDEO = _frames([5, 6.7, 13.3])


@pytest.mark.parametrize(
    ("parts", "layout"),
    [
        ([(VIDEO, True)], TokenLayout.video(3, 2, 3)),
        ([(_frames([5]), True)], TokenLayout.video(1, 2, 3)),
        ([(_text(5), False), (VIDEO, True)], TokenLayout.video(3, 2, 3, text_before=5)),
        # the next ones are conditions right before the video: the first frame, the last, one of another size
        ([(_frames([5]), True), (VIDEO, True)], TokenLayout.video(3, 2, 3, text_before=6)),
        ([(_frames([18.3]), True), (VIDEO, True)], TokenLayout.video(3, 2, 3, text_before=6)),
        ([(_frames([4], 2, 4), True), (VIDEO, True)], TokenLayout.video(3, 2, 3, text_before=8)),
        (
            [(_frames([4], across=1), True), (VIDEO, True)],
            TokenLayout.video(3, 2, 3, text_before=6),
        ),
        ([(_frames([5]), True), (_frames([5]), True)], TokenLayout.video(1, 2, 3, text_before=6)),
        # two videos with sound between them: the last one is the grid
        (
            [(VIDEO, True), (_text(4), False), (_frames([9, 10]), True), (_text(2), False)],
            TokenLayout((Segment.global_(22), Segment.grid(2, 2, 3), Segment.global_(2))),
        ),
        ([(_text(5), False)], None),
        ([(VIDEO[:-1], True)], None),  # its last frame is none
        ([(VIDEO[[*range(12), 12, 13, 14, 15, 17, 16]], True)], None),
        ([(torch.zeros(6, 3), True)], None),
    ],
)
def test_the_video_is_found_by_its_positions(parts, layout):
    assert _read(*parts) == layout


def test_positions_are_read_once_a_tensor_and_anew_after_a_change():
    positions, indices = torch.cat([_text(4), VIDEO]), torch.arange(4, 22)
    arguments = {"position_ids": positions, "video_indices": indices}
    assert LAYOUT(None, arguments) is LAYOUT(None, arguments)
    positions[16:, 0] = positions[10, 0]  # the last frame's time is that of the one before
    assert LAYOUT(None, arguments) == TokenLayout.video(1, 2, 3, text_before=16)


def _parts(name):
    transformer, _ = BUILDERS["minimax_h3"]()
    return {
        name: transformer,
        "scheduler": diffusers.MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": diffusers.MiniMaxH3Scheduler(shift=3.0),
    }


def _keyframes():
    """Between a first and a last frame."""
    pipe = MiniMaxH3FL2VACoreDenoiseStep().init_pipeline()
    pipe.update_components(**_parts("transformer"))
    call = {
        "keyframe_anchors": ("first", "last"),
        "condition_latents": list(randn(2, 1, 24, 1, 4, 4)),
    }
    return pipe, call, 12 + 2 * 4 + SOUND


def _references():
    """With an image as reference, by the weights of their own."""
    pipe = MiniMaxH3Ref2VACoreDenoiseStep().init_pipeline()
    pipe.update_components(**_parts("transformer_ref"))
    image = MiniMaxH3ImageReference(image=torch.zeros(3, 64, 96, dtype=torch.uint8))
    call = {
        "normalized_references": [image],
        "condition_latents": [randn(1, 24, 1, 4, 6)],
        "audio_condition_latents": [],
    }
    return pipe, call, 12 + 6 + SOUND


@pytest.mark.parametrize("made", [_keyframes, _references])
def test_conditions_are_tokens_that_all_see(made):
    pipe, call, before = made()
    call |= {"prompt_embeds": randn(1, 12, 32), "text_token_tags": torch.ones(12)}
    call |= {"height": 64, "width": 64, "num_frames": 124, "num_inference_steps": 3}
    run = functools.partial(generate, pipe, {**call, "output": "latents"})
    pipe.set_progress_bar_config(disable=True)
    ((name, transformer),) = (
        (n, part) for n, part in pipe.components.items() if n.startswith("transformer")
    )
    stock, plan = run(), plan_for(transformer, NARROW)
    plan = replace(plan, components={name: plan.components["transformer"]})
    with patch(pipe, plan) as handle:
        sparse = run()
        (context,) = (a.context for a in handle._attachments.values())
    assert context.layout == TokenLayout.video(FRAMES, 2, 2, text_before=before)
    assert (context.run, context.step) == (0, 1)
    assert {(r.layer, r.dense_because) for r in handle.ran[name]} == {(n, None) for n in LAYERS}
    assert 0 < drift(sparse, stock) < 0.5
    with patch(pipe, plan, backend="reference"):
        torch.testing.assert_close(run(), sparse, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(), stock)


@functools.cache
def _whole():
    return minimax_h3(BUILDERS["minimax_h3"]()[0])


def test_a_whole_search_from_prompts_to_frames(monkeypatch, tmp_path, capfd):
    stub_costs(monkeypatch)
    pipe = _whole()
    options = {"settings": SETTINGS, "profile_steps": 2, "rows": 8, "max_error": 0.4}
    prompts = ("a cat plays the piano", "a dog")
    plan = search_plan(pipe, prompts, held_out=["a red circle"], **options).plan
    assert "it/s" not in capfd.readouterr().err  # its loop's progress bar
    part = plan.components["transformer"]
    assert part.layout.grid == (FRAMES, 2, 2) and set(part.layers) == LAYERS
    assert 0 < plan.density < 1 and math.isfinite(plan.measured["psnr_db"])
    (ran,) = accounts(pipe, plan, Case("a red circle", 7), SETTINGS, tmp_path).values()
    assert {entry.layer for entry in ran} == LAYERS and None in {r.dense_because for r in ran}


def test_a_geometric_plan_needs_no_more_than_the_size():
    pipe = _whole()
    call = {"prompt": "a cat", "height": 256, "width": 256, "num_frames": 124}
    plan = geometric_plan(pipe, density=0.8, call={**call, "num_inference_steps": 5})
    assert plan.components["transformer"].layout.grid == (FRAMES, 8, 8)
    assert plan.density == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"height": 48}, "multiple of 32"),
        (
            {"num_frames": 100},
            "17 k \\+ 5 from 124 to 345 .*try height 64, width 64, num_frames 124",
        ),
        ({"num_frames": 346}, "num_frames 345"),
        ({"guidance": 5.0}, "takes no guidance_scale: .*give guidance 1"),
        ({"max_sequence_length": 16}, "takes no max_sequence_length"),
    ],
)
def test_what_it_cannot_make_is_refused_before_it_runs(changed, words):
    work = workload(_whole(), replace(SETTINGS, **changed))
    with pytest.raises(ValueError, match=words):
        work.check(Case("a cat"))


def test_frames_are_rounded_up_as_the_host_does():
    work = workload(_whole(), replace(SETTINGS, num_frames=340))
    work.check(Case("a cat"))
    larger = work.larger()
    assert larger.settings == replace(SETTINGS, height=128, width=128, num_frames=108, steps=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The pipeline as files; its processor, which would need torchvision, is a stand-in."""
    pipe = MiniMaxH3Blocks().get_workflow("t2va").init_pipeline()
    parts = {name: part for name, part in _whole().components.items() if name != "processor"}
    sound = diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=1,
        latent_dim=32,
        num_attention_heads=1,
        decoder_dim=128,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        latents_mean=[0.0] * 32,
        latents_std=[1.0] * 32,
    )
    pipe.update_components(**parts, audio_vae=sound)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    index = tmp_path / "modular_model_index.json"
    entries = json.loads(index.read_text())
    told = {"pretrained_model_name_or_path": str(tmp_path), "subfolder": "", "type_hint": None}
    told["type_hint"] = ["transformers", "Qwen3VLProcessor"]
    entries["processor"] = [*told["type_hint"], told]
    index.write_text(json.dumps(entries))
    processor = transformers.Qwen3VLProcessor
    monkeypatch.setattr(processor, "from_pretrained", lambda *args, **options: Processor())
    return tmp_path


def test_its_folder_is_loaded_with_what_a_prompt_needs(folder):
    pipe = load_pipeline(str(folder), "cpu", None)
    assert "transformer_ref" not in pipe.components
    read, kept = (p.transformer.state_dict() for p in (pipe, _whole()))
    assert all(torch.equal(read[name], kept[name]) for name in kept)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ValueError, match="all components must load, but transformer didn't"):
        load_pipeline(str(folder), "cpu", None)


def test_no_weights_of_its_transformer_are_read_where_none_are_needed(folder):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.unlink()
    pipe = load_pipeline(str(folder), "cpu", None, weights=False)
    assert {p.untyped_storage().nbytes() for p in pipe.transformer.parameters()} == {4}
