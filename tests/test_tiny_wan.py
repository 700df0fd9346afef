"""The embedded model: its weights, its drawn data, and the script that trains it."""

import json
import math
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import AutoencoderKLWan, WanPipeline

from demos.tiny_wan import decoder, few_steps, train
from demos.tiny_wan.batches import BUCKETS, Bucket, make_batch
from demos.tiny_wan.folder import write_pipeline
from demos.tiny_wan.measure import eval_prompts, score
from demos.tiny_wan.recognise import read_video
from demos.tiny_wan.seams import decoded, seam_ratio
from demos.tiny_wan.text import build_tokenizer, encode
from demos.tiny_wan.vae import PatchEncoder, build_vae, fit_pca, linear_vae
from sparse_dit.eval.draw import all_prompts, draw, draw_prompt, parse_prompt, sample_prompt

MODEL = Path(__file__).parents[1] / "demos" / "tiny_wan" / "model"


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(MODEL).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(a, b):
    return -10 * math.log10(((a - b) / 2).square().mean().item())


def test_drawing_follows_the_seed():
    one, prompt = draw(5, 24, 40, Random(3))
    two, again = draw(5, 24, 40, Random(3))
    other, _ = draw(5, 24, 40, Random(4))
    assert one.shape == (3, 5, 24, 40)
    assert one.abs().max() <= 1
    assert prompt == again
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_prompts_parse():
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts)) == 768
    assert all(parse_prompt(prompt).prompt == prompt for prompt in prompts)
    assert sample_prompt(Random(0)) in prompts
    assert parse_prompt("A red circle moves left over gray plain.").motion == "left"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a cat", "expected 'a COLOR"), ("a pink circle moves up over gray plain", "color 'pink'")],
)
def test_a_strange_prompt_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)


def test_drawn_clips_are_recognised():
    prompts = eval_prompts(24)
    videos = [draw_prompt(p, 9, 64, 64, Random(i)) for i, p in enumerate(prompts)]
    result = score(videos, prompts)
    assert result["all five"] == 1, result
    assert result["fit"] > 0.9


def test_an_empty_picture_has_no_object():
    assert read_video(torch.zeros(3, 5, 64, 64)).scene.color == "none"


def test_the_folder_loads_and_samples(pipe):
    result = pipe(
        "a red circle moves left over gray plain",
        height=32,
        width=32,
        num_frames=3,
        num_inference_steps=2,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    assert result.frames.shape == (1, 4, 3, 32, 32)
    assert result.frames.isfinite().all()


def test_the_folder_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) < 20e6


@pytest.mark.parametrize("source", ["shipped", "fitted"])
def test_vae_round_trip(pipe, source):
    vae = pipe.vae if source == "shipped" else build_vae(fit_pca(24))
    video, _ = draw(9, 128, 128, Random(0))
    with torch.no_grad():
        latents = vae.encode(video[None]).latent_dist.mode()
        back = vae.decode(latents).sample[0]
    assert psnr(back, video) >= 28
    expected = latents / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert (PatchEncoder(vae)(video[None]) - expected).abs().max() < 0.02


@pytest.mark.parametrize("source", ["shipped", "built"])
def test_the_tokenizer_knows_every_word(pipe, source):
    tokenizer = pipe.tokenizer if source == "shipped" else build_tokenizer()
    for prompt in all_prompts():
        tokens = tokenizer(prompt).input_ids
        assert len(tokens) == len(prompt.split()) + 1
        assert tokenizer.unk_token_id not in tokens


def test_a_batch_has_the_shapes_of_the_pipeline(pipe):
    def encode_text(prompts, length):
        return encode(pipe.tokenizer, pipe.text_encoder, prompts, length)

    batch = make_batch(BUCKETS[0], PatchEncoder(pipe.vae), encode_text, Random(0))
    assert batch.latents.shape == batch.noise.shape == (8, 16, 8, 8, 8)
    assert batch.text.shape == (8, 20, 128)
    assert batch.text_bias.shape == (8, 1, 1, 20)
    assert ((batch.sigma >= 0) & (batch.sigma <= 1)).all()


def test_training_from_nothing_writes_a_folder_that_loads(tmp_path):
    out = tmp_path / "model"
    threads = torch.get_num_threads()
    train.main(["--out", str(out), "--steps", "1", "--save-every", "0"])
    torch.set_num_threads(threads)
    trained = WanPipeline.from_pretrained(out)
    assert trained.transformer.proj_out.weight.abs().max() > 0
    assert '"PreTrainedTokenizerFast"' in (out / "model_index.json").read_text()
    assert json.loads((out / "tokenizer" / "tokenizer.json").read_text())["truncation"] is None
    assert not any("_name_or_path" in path.read_text() for path in out.rglob("*.json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_interrupted_write_keeps_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "model"
    out.mkdir()
    (out / "README.md").write_text("card")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(WanPipeline, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pipeline(WanPipeline.from_pretrained(MODEL), out)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "README.md"]


def test_the_decoder_shows_no_seams(pipe):
    video, _ = draw(1, 192, 192, Random(1))
    latents = [PatchEncoder(pipe.vae)(video[None])]
    (before,), (after,) = (decoded(vae, latents) for vae in (linear_vae(pipe.vae), pipe.vae))
    assert seam_ratio([before]) > 1.5 > 1.2 > seam_ratio([after])
    assert psnr(after, video) > psnr(before, video) + 1 > 29


def test_training_the_decoder_starts_from_the_linear_one(tmp_path, pipe):
    linear, out = linear_vae(pipe.vae), tmp_path / "vae"
    latents = torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    same = decoder.write_decoder(decoder.planar(linear.decoder), linear)
    assert (decoded(same, [latents])[0] - decoded(linear, [latents])[0]).abs().max() < 0.01
    threads = torch.get_num_threads()
    decoder.main([str(MODEL), "--out", str(out), "--cpu-seconds", "0.01", "--save-every", "0"])
    torch.set_num_threads(threads)
    trained, shipped = (
        AutoencoderKLWan.from_pretrained(path).state_dict() for path in (out, MODEL / "vae")
    )
    changed = {name for name, x in trained.items() if not torch.equal(x, shipped[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_ladder_ends_where_the_scheduler_does(pipe):
    ladder = few_steps.Ladder.of(pipe, 4, 3)
    pipe.scheduler.set_timesteps(4)
    assert ladder.knots == pytest.approx(pipe.scheduler.sigmas.tolist())
    assert [len(rungs) for rungs in ladder.rungs] == [4, 4, 4, 2]
    ends = [(rungs[0], rungs[-1]) for rungs in ladder.rungs]
    assert ends == list(zip(ladder.knots, ladder.knots[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "few", "steps"), [("eight_steps", 8, 15), ("four_steps", 4, 13)], ids=["eight", "four"]
)
def test_a_shipped_lora_brings_few_steps_nearer_to_the_guided_model(name, few, steps):
    pytest.importorskip("peft")
    pipe = WanPipeline.from_pretrained(MODEL).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = eval_prompts(2)

    def videos(steps, guidance):
        return [
            pipe(prompt, height=64, width=64, num_frames=15, num_inference_steps=steps,
                 guidance_scale=guidance, max_sequence_length=32, output_type="pt",
                 generator=torch.Generator().manual_seed(seed)).frames
            for seed, prompt in enumerate(prompts)
        ]  # fmt: skip

    taught, before = videos(steps, few_steps.GUIDANCE), videos(few, 1.0)
    pipe.load_lora_weights(MODEL.parent, weight_name=f"{name}.safetensors")
    after = videos(few, 1.0)
    for goal, without, with_it in zip(taught, before, after, strict=True):
        assert psnr(with_it, goal) > psnr(without, goal) + 2


def test_a_distilled_lora_loads_as_any_other(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(few_steps, "BUCKETS", (Bucket(2, 4, 4, 1, (1, 1)),))
    threads, out = torch.get_num_threads(), tmp_path / "lora.safetensors"
    few_steps.main([str(MODEL), "--steps", "4", "--out", str(out), "--cpu-seconds", "0.01"])
    torch.set_num_threads(threads)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    changed = WanPipeline.from_pretrained(MODEL).to(torch.float32)
    before = changed.transformer.blocks[0].attn1.to_q.weight.clone()
    changed.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    changed.fuse_lora()
    changed.unload_lora_weights()
    assert not torch.equal(changed.transformer.blocks[0].attn1.to_q.weight, before)
