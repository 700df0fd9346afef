"""Tiny random image pipelines, built offline, and a default call for each.

Like `tests.helpers.tiny_pipelines`, but text encoders are left out: the calls hold random embeddings in their
place (and latents come out, so that no autoencoder is needed either).
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.helpers.tiny_pipelines import generate, tokenizer

__all__ = ["BUILDERS", "SEVERAL", "generate"]

Built = tuple[Any, dict[str, Any]]


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _flow(**options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def _finish(pipe: Any, call: dict[str, Any]) -> Built:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipe, {**size, **call}


def flux2() -> Built:
    """Flux2 klein: 16 text tokens, then 8 x 8; cond and uncond in two calls."""
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(  # latents leave through its normalisation
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
    ).eval()
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=_flow(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    embeds = {"prompt_embeds": _random(1, 16, 32), "guidance_scale": 3.0}
    size = {"height": 128, "width": 128}
    return _finish(pipe, {**embeds, **size, "negative_prompt_embeds": _random(1, 16, 32, seed=2)})


def chroma() -> Built:
    """Chroma: 16 text tokens, some of them padding, then 8 x 8; cond and uncond in two calls."""
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ).eval()
    pipe = diffusers.ChromaPipeline(
        scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    mask = (torch.arange(16) < 9).float()[None]
    call = {
        "prompt_embeds": _random(1, 16, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": _random(1, 16, 32, seed=2),
        "negative_prompt_attention_mask": (torch.arange(16) < 5).float()[None],
        "guidance_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def qwen() -> Built:
    """Qwen-Image: 7 text tokens (5 in the other branch), then 8 x 8; two calls."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipe = diffusers.QwenImagePipeline(
        scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    call = {
        "prompt_embeds": _random(1, 7, 32),
        "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
        "negative_prompt_embeds": _random(1, 5, 32, seed=2),
        "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long),
        "true_cfg_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def sd3() -> Built:
    """SD3.5: 8 x 8, then 12 text tokens; the first layer has a second attention; guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=None,
        **{f"text_encoder{n}": None for n in ("", "_2", "_3")},
        **{f"tokenizer{n}": None for n in ("", "_2", "_3")},
    )
    call = {
        "prompt_embeds": _random(1, 12, 32),
        "negative_prompt_embeds": _random(1, 12, 32, seed=2),
        "pooled_prompt_embeds": _random(1, 16),
        "negative_pooled_prompt_embeds": _random(1, 16, seed=2),
        "guidance_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def pixart() -> Built:
    """PixArt-Sigma: 8 x 8 alone; guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    ).eval()
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )
    mask = torch.ones(1, 12, dtype=torch.long)
    call = {
        "prompt_embeds": _random(1, 12, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": _random(1, 12, 32, seed=2),
        "negative_prompt_attention_mask": mask,
        "negative_prompt": None,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def zimage() -> Built:
    """Z-Image: 8 x 8 (64 tokens), then text of 9 and 40 tokens, padded to 32 and 64; batched."""
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    ).eval()
    with torch.no_grad():  # zeros at first, as if there were nothing to be seen
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    pipe = diffusers.ZImagePipeline(
        scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    call = {
        "prompt_embeds": [_random(9, 32)],
        "negative_prompt_embeds": [_random(40, 32, seed=2)],
        "guidance_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def hunyuan_image() -> Built:
    """HunyuanImage: 8 x 8, then text of two encoders (10 + 6), padding last; two calls."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    ).eval()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=_flow(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        guider=guider,
    )
    first, second = torch.arange(10) < 7, torch.arange(6) < 2
    call = {
        "prompt_embeds": _random(1, 10, 32),
        "prompt_embeds_mask": first.long()[None],
        "negative_prompt_embeds": _random(1, 10, 32, seed=2),
        "negative_prompt_embeds_mask": (torch.arange(10) < 3).long()[None],
        "prompt_embeds_2": _random(1, 6, 32),
        "prompt_embeds_mask_2": second.long()[None],
        "negative_prompt_embeds_2": _random(1, 6, 32, seed=2),
        "negative_prompt_embeds_mask_2": second.long()[None],
    }
    return _finish(pipe, {**call, "height": 256, "width": 256})


def lumina() -> Built:
    """Lumina 2: 9 of 12 text tokens (4 in the other branch), then 8 x 8; two calls; 2 key heads."""
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(64, 32, 32),
        cap_feat_dim=32,
    ).eval()
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=None,
        text_encoder=None,
        tokenizer=tokenizer(),
    )
    call = {
        "prompt_embeds": _random(1, 12, 32),
        "prompt_attention_mask": (torch.arange(12) < 9).long()[None],
        "negative_prompt_embeds": _random(1, 12, 32, seed=2),
        "negative_prompt_attention_mask": (torch.arange(12) < 4).long()[None],
        "guidance_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def cogview() -> Built:
    """CogView 4: 16 text tokens, then 8 x 8; cond and uncond in two calls."""
    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=16,
        rope_axes_dim=(16, 16),
    ).eval()
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=_flow(),
    )
    call = {
        "prompt_embeds": _random(1, 16, 32),
        "negative_prompt_embeds": _random(1, 16, 32, seed=2),
        "guidance_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def hidream() -> Built:
    """HiDream: 8 x 8, then 6 tokens of T5 and twice 6 of Llama; guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 4, 8),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1],
        force_inference_output=True,
    ).eval()
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=_flow(),
        vae=None,
        **{f"text_encoder{n}": None for n in ("", "_2", "_3", "_4")},
        **{f"tokenizer{n}": None for n in ("", "_2", "_3", "_4")},
        transformer=transformer,
    )
    pipe.default_sample_size = 16
    call = {
        "prompt_embeds_t5": _random(1, 6, 32),
        "negative_prompt_embeds_t5": _random(1, 6, 32, seed=2),
        "prompt_embeds_llama3": _random(2, 1, 6, 32),
        "negative_prompt_embeds_llama3": _random(2, 1, 6, 32, seed=2),
        "pooled_prompt_embeds": _random(1, 16),
        "negative_pooled_prompt_embeds": _random(1, 16, seed=2),
        "guidance_scale": 3.0,
    }
    return _finish(pipe, {**call, "height": 128, "width": 128})


def _lengths(*lengths: int, of: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A mask whose first tokens are valid, as many as an item has."""
    return (torch.arange(of) < torch.tensor(lengths)[:, None]).to(dtype)


# two prompts of different lengths where the model is told lengths, two images of each
SEVERAL: dict[str, dict[str, Any]] = {
    "flux2": {
        "prompt_embeds": _random(2, 16, 32),
        "negative_prompt_embeds": _random(2, 16, 32, seed=2),
    },
    "chroma": {
        "prompt_embeds": _random(2, 16, 32),
        "prompt_attention_mask": _lengths(9, 13, of=16, dtype=torch.float32),
        "negative_prompt_embeds": _random(2, 16, 32, seed=2),
        "negative_prompt_attention_mask": _lengths(5, 16, of=16, dtype=torch.float32),
    },
    "qwen": {
        "prompt_embeds": _random(2, 7, 32),
        "prompt_embeds_mask": _lengths(7, 4, of=7),
        "negative_prompt_embeds": _random(2, 5, 32, seed=2),
        "negative_prompt_embeds_mask": _lengths(2, 5, of=5),
    },
    "sd3": {
        "prompt_embeds": _random(2, 12, 32),
        "negative_prompt_embeds": _random(2, 12, 32, seed=2),
        "pooled_prompt_embeds": _random(2, 16),
        "negative_pooled_prompt_embeds": _random(2, 16, seed=2),
    },
    "pixart": {
        "prompt_embeds": _random(2, 12, 32),
        "prompt_attention_mask": _lengths(12, 5, of=12),
        "negative_prompt_embeds": _random(2, 12, 32, seed=2),
        "negative_prompt_attention_mask": _lengths(12, 3, of=12),
    },
    "zimage": {
        "prompt_embeds": [_random(9, 32), _random(70, 32, seed=3)],
        "negative_prompt_embeds": [_random(40, 32, seed=2), _random(3, 32, seed=4)],
    },
    "hunyuan_image": {
        "prompt_embeds": _random(2, 10, 32),
        "prompt_embeds_mask": _lengths(7, 10, of=10),
        "negative_prompt_embeds": _random(2, 10, 32, seed=2),
        "negative_prompt_embeds_mask": _lengths(3, 2, of=10),
        "prompt_embeds_2": _random(2, 6, 32),
        "prompt_embeds_mask_2": _lengths(2, 5, of=6),
        "negative_prompt_embeds_2": _random(2, 6, 32, seed=2),
        "negative_prompt_embeds_mask_2": _lengths(1, 1, of=6),
    },
    "lumina": {
        "prompt_embeds": _random(2, 12, 32),
        "prompt_attention_mask": _lengths(9, 5, of=12),
        "negative_prompt_embeds": _random(2, 12, 32, seed=2),
        "negative_prompt_attention_mask": _lengths(4, 11, of=12),
    },
    "cogview": {
        "prompt_embeds": _random(2, 16, 32),
        "negative_prompt_embeds": _random(2, 16, 32, seed=2),
    },
    "hidream": {
        "prompt_embeds_t5": _random(2, 6, 32),
        "negative_prompt_embeds_t5": _random(2, 6, 32, seed=2),
        "prompt_embeds_llama3": _random(2, 2, 6, 32),
        "negative_prompt_embeds_llama3": _random(2, 2, 6, 32, seed=2),
        "pooled_prompt_embeds": _random(2, 16),
        "negative_pooled_prompt_embeds": _random(2, 16, seed=2),
    },
}
for _name, _call in SEVERAL.items():
    if _name in ("chroma", "sd3", "lumina", "cogview"):  # these don't repeat all that is given
        _call.update({key: value.repeat_interleave(2, 0) for key, value in _call.items()})
    else:
        _call["num_images_per_prompt"] = 2

BUILDERS = {
    "flux2": flux2,
    "chroma": chroma,
    "qwen": qwen,
    "sd3": sd3,
    "pixart": pixart,
    "zimage": zimage,
    "hunyuan_image": hunyuan_image,
    "lumina": lumina,
    "cogview": cogview,
    "hidream": hidream,
}
