"""Tiny random video transformers, and the arguments that their pipelines give to a forward.

Every one of `BUILDERS` returns `(transformer, [arguments of a forward, ...])`, two prompts in each;
forwards of two guidance branches differ in their text. Whole pipelines: `tests.helpers.tiny_video_pipelines`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3Ref2VAPrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
)
from torch import Tensor

Built = tuple[Any, list[dict[str, Any]]]
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
COG = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 12,
    "use_rotary_positional_embeddings": True,
}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(*lengths: int, size: int) -> Tensor:
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


def _branches(call: dict[str, Any], texts: int = 12) -> list[dict[str, Any]]:
    """One forward a branch: the same but for its text."""
    return [{**call, "encoder_hidden_states": randn(2, texts, 32, seed=s)} for s in (2, 3)]


def wan_like(kind: str, channels: int = 16, texts: int = 12, **options: Any) -> Built:
    torch.manual_seed(0)
    transformer = getattr(diffusers, kind)(**{**WAN, **options}).eval()
    call = {"hidden_states": randn(2, channels, 3, 16, 16), "timestep": torch.full((2,), 700)}
    return transformer, _branches(call, texts)


def wan_i2v() -> Built:
    """Wan image to video: keys of an image in cross-attention."""
    transformer, calls = wan_like(
        "WanTransformer3DModel", 36, 512, in_channels=36, image_dim=16, added_kv_proj_dim=48
    )
    return transformer, [{**c, "encoder_hidden_states_image": randn(2, 5, 16)} for c in calls]


def wan_ti2v() -> Built:
    """Wan 2.2 TI2V: a timestep for each token, 0 in the first frame."""
    transformer, calls = wan_like("WanTransformer3DModel")
    timestep = torch.full((2, 3 * 8 * 8), 700)
    timestep[:, : 8 * 8] = 0
    return transformer, [{**c, "timestep": timestep} for c in calls]


def wan_vace() -> Built:
    """Wan VACE: blocks of their own for the control video."""
    transformer, calls = wan_like("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=8)
    return transformer, [{**c, "control_hidden_states": randn(2, 8, 3, 16, 16)} for c in calls]


def wan_animate() -> Built:
    """Wan Animate: pose added to the tokens, a face by adapters of another attention."""
    transformer, calls = wan_like(
        "WanAnimateTransformer3DModel",
        36,
        512,
        in_channels=36,
        latent_channels=16,
        image_dim=16,
        added_kv_proj_dim=48,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    extra = {
        "encoder_hidden_states_image": randn(2, 5, 16),
        "pose_hidden_states": randn(2, 16, 2, 16, 16),
        "face_pixel_values": randn(2, 3, 5, 16, 16),
    }
    return transformer, [{**c, **extra} for c in calls]


def skyreels() -> Built:
    """SkyReels-V2 with diffusion forcing: a timestep for each frame."""
    transformer, calls = wan_like("SkyReelsV2Transformer3DModel")
    forcing = {
        "timestep": torch.tensor([[0, 300, 700]] * 2),
        "enable_diffusion_forcing": True,
    }
    return transformer, [calls[0], {**calls[1], **forcing}]


def chronoedit() -> Built:
    """ChronoEdit: two frames of which the last is far in time."""
    transformer, calls = wan_like(
        "ChronoEditTransformer3DModel", 36, 512, in_channels=36, image_dim=16, added_kv_proj_dim=48
    )
    return transformer, [
        {
            **c,
            "hidden_states": c["hidden_states"][:, :, :2],
            "encoder_hidden_states_image": randn(2, 5, 16),
        }
        for c in calls
    ]


def _rotary(tokens: int) -> tuple[Tensor, Tensor]:
    angle = randn(tokens, 8, seed=5).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def cogvideox15() -> Built:
    """CogVideoX 1.5: 12 text tokens, then pairs of latent frames; guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        **{**COG, "patch_size_t": 2, "patch_bias": False}
    ).eval()
    call = {
        "hidden_states": randn(4, 4, 4, 16, 16),
        "encoder_hidden_states": randn(4, 12, 32, seed=2),
        "timestep": torch.full((4,), 700),
        "image_rotary_emb": _rotary(2 * 8 * 8),
    }
    return transformer, [call]


def consisid(**options: Any) -> Built:
    """ConsisID: 12 text tokens, then 3 x 8 x 8; an attention of its own for the face."""
    torch.manual_seed(0)
    face = {
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 2,
        "LFE_vit_dim": 2,
        "LFE_depth": 5,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 1,
        "LFE_num_querie": 1,
        "LFE_output_dim": 42,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 1,
    }
    transformer = diffusers.ConsisIDTransformer3DModel(**{**COG, **face, **options}).eval()
    call = {
        "hidden_states": randn(4, 3, 4, 16, 16),
        "encoder_hidden_states": randn(4, 12, 32, seed=2),
        "timestep": torch.full((4,), 700),
        "image_rotary_emb": _rotary(3 * 8 * 8),
        "id_cond": randn(4, 2),
        "id_vit_hidden": [randn(4, 2, 2)],
    }
    return transformer, [call]


def _hunyuan_call(frames: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, frames, 16, 16),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": randn(2, 12, 32, seed=2),
        "encoder_attention_mask": mask_of(12, 7, size=12),
    }


def hunyuan_i2v() -> Built:
    """HunyuanVideo image to video: the first frame's tokens are modulated by another timestep."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **HUNYUAN,
        num_single_layers=1,
        pooled_projection_dim=32,
        guidance_embeds=False,
        image_condition_type="token_replace",
    ).eval()
    return transformer, [{**_hunyuan_call(), "pooled_projections": randn(2, 32)}]


def framepack() -> Built:
    """FramePack: history of 4 + 16 + 128 tokens, 3 x 8 x 8, then 5 + 12 of image and text."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN,
        num_single_layers=1,
        pooled_projection_dim=32,
        guidance_embeds=False,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    ).eval()
    several = {
        **_hunyuan_call(),
        "pooled_projections": randn(2, 32),
        "image_embeds": randn(2, 5, 16),
        "indices_latents": torch.arange(8, 11),
        "latents_clean": randn(2, 4, 2, 16, 16, seed=3),
        "indices_latents_clean": torch.tensor([0, 11]),
        "latents_history_2x": randn(2, 4, 2, 16, 16, seed=4),
        "indices_latents_history_2x": torch.arange(12, 14),
        "latents_history_4x": randn(2, 4, 4, 16, 16, seed=5),
        "indices_latents_history_4x": torch.arange(14, 18),
    }
    one = {  # whose padding is cut off
        name: value if name.startswith("indices") else value[1:] for name, value in several.items()
    }
    return transformer, [several, one]


def hunyuan15() -> Built:
    """HunyuanVideo 1.5: 3 x 8 x 8, then 4 + 6 + 12 of image, glyphs and text; two branches."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **{**HUNYUAN, "num_layers": 2}, text_embed_2_dim=16, image_embed_dim=16
    ).eval()
    call = {
        **_hunyuan_call(),
        "encoder_hidden_states_2": randn(2, 6, 16),
        "encoder_attention_mask_2": mask_of(0, 4, size=6),
        "image_embeds": torch.zeros(2, 4, 16),
    }
    return transformer, [call, {**call, "image_embeds": randn(2, 4, 16)}]


def ltx2(**options: Any) -> Built:
    """LTX 2: 3 x 8 x 8 beside sound, which has attention of its own; guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=32,
        rope_double_precision=False,
        **options,
    ).eval()
    call = {
        "hidden_states": randn(4, 3 * 8 * 8, 4),
        "audio_hidden_states": randn(4, 9, 4),
        "encoder_hidden_states": randn(4, 12, 32, seed=2),
        "audio_encoder_hidden_states": randn(4, 12, 32, seed=2),
        "encoder_attention_mask": mask_of(12, 7, 1, 3, size=12),
        "audio_encoder_attention_mask": mask_of(12, 7, 1, 3, size=12),
        "timestep": torch.full((4,), 700),
        "num_frames": 3,
        "height": 8,
        "width": 8,
        "audio_num_frames": 9,
    }
    return transformer, [call]


def mochi() -> Built:
    """Mochi: 3 x 8 x 8, then each item's valid text tokens (of one: none); guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=12,
    ).eval()
    call = {
        "hidden_states": randn(4, 4, 3, 16, 16),
        "encoder_hidden_states": randn(4, 12, 32, seed=2),
        "timestep": torch.full((4,), 300),
        "encoder_attention_mask": mask_of(0, 2, 12, 7, size=12).bool(),
    }
    return transformer, [call]


def allegro() -> Built:
    """Allegro: 3 x 8 x 8; guidance batched."""
    torch.manual_seed(0)
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=16,
        sample_height=16,
        sample_frames=3,
        caption_channels=32,
    ).eval()
    call = {
        "hidden_states": randn(4, 4, 3, 16, 16),
        "encoder_hidden_states": randn(4, 1, 12, 32, seed=2),
        "timestep": torch.full((4,), 700),
        "encoder_attention_mask": mask_of(12, 7, 1, 3, size=12),
    }
    return transformer, [call]


def easyanimate(**options: Any) -> Built:
    """EasyAnimate: 12 + 5 text tokens, then 3 x 8 x 8; guidance batched."""
    torch.manual_seed(0)
    config = {"text_embed_dim_t5": 16, **options}
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        time_embed_dim=4,
        text_embed_dim=32,
        sample_width=16,
        sample_height=16,
        **config,
    ).eval()
    call = {
        "hidden_states": randn(4, 4, 3, 16, 16),
        "encoder_hidden_states": randn(4, 12, 32, seed=2),
        "encoder_hidden_states_t5": randn(4, 5, 16, seed=3),
        "timestep": torch.full((4,), 700),
    }
    return transformer, [call]


def cosmos(**options: Any) -> Built:
    """Cosmos 2: 3 x 8 x 8, guidance in two calls, a noise level for each frame."""
    torch.manual_seed(0)
    config = {"in_channels": 4, "out_channels": 4, "extra_pos_embed_type": None, **options}
    transformer = diffusers.CosmosTransformer3DModel(
        concat_padding_mask=False,  # it is resized by torchvision, which needn't be installed
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        **config,
    ).eval()
    sigmas = torch.tensor([0.1, 0.7, 0.7]).view(1, 1, 3, 1, 1).expand(2, -1, -1, -1, -1)
    calls = _branches({"hidden_states": randn(2, 4, 3, 16, 16), "timestep": sigmas})
    return transformer, calls


def cosmos1() -> Built:
    """Cosmos 1: learnable positions, a logarithm as timestep: here sigma is 7 / 3."""
    transformer, calls = cosmos(extra_pos_embed_type="learnable")
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_data=1.0)
    timestep = scheduler.precondition_noise(torch.tensor([7 / 3] * 2))
    return transformer, [{**call, "timestep": timestep, "fps": 30} for call in calls]


def kandinsky6() -> Built:
    """Kandinsky 6 without sound."""
    torch.manual_seed(0)
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    ).eval()
    call = {
        "hidden_states": randn(2, 3, 16, 16, 4),
        "pooled_projections": randn(2, 16),
        "timestep": torch.full((2,), 700.0),
    }
    return transformer, _branches(call)


def anyflow() -> Built:
    """AnyFlow, not causal: frames before channels, two noise levels of which the first counts."""
    torch.manual_seed(0)
    options = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    transformer = diffusers.AnyFlowTransformer3DModel(**options, rope_max_seq_len=32).eval()
    call = {"hidden_states": randn(2, 3, 16, 16, 16)}
    levels = {"timestep": torch.full((2, 3), 700.0), "r_timestep": torch.full((2, 3), 300.0)}
    return transformer, _branches({**call, **levels})


def joyimage() -> Built:
    """JoyImage Edit: 8 x 8, then an image that is edited, then 12 text tokens."""
    torch.manual_seed(0)
    transformer = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=32,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    ).eval()
    call = {"hidden_states": randn(2, 2, 4, 1, 16, 16), "timestep": torch.full((2,), 700.0)}
    return transformer, _branches(call)


def kandinsky() -> Built:
    """Kandinsky 5: 3 x 8 x 8, one item a call; guidance in two calls."""
    torch.manual_seed(0)
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    ).eval()
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:  # the host starts them at zero: no layer would do anything
            torch.nn.init.normal_(parameter, std=0.3)
    calls = [
        {
            "hidden_states": randn(1, 3, 16, 16, 4),
            "encoder_hidden_states": randn(1, 12, 32, seed=seed),
            "pooled_projections": randn(1, 16, seed=seed),
            "timestep": torch.full((1,), 700.0),
            "visual_rope_pos": [torch.arange(3), torch.arange(8), torch.arange(8)],
            "text_rope_pos": torch.arange(12),
        }
        for seed in (2, 3)
    ]
    return transformer, calls


def motif(**options: Any) -> Built:
    """Motif-Video: 3 x 8 x 8, then 12 text tokens of which some are padding; guidance in two calls."""
    torch.manual_seed(0)
    config = {"in_channels": 4, "out_channels": 4, "num_single_layers": 1, **options}
    transformer = diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 6, 6),
        **config,
    ).eval()
    calls = [
        {
            "hidden_states": randn(2, 4, 3, 16, 16),
            "encoder_hidden_states": randn(2, 12, 32, seed=seed),
            "encoder_attention_mask": mask,
            "timestep": torch.full((2,), 700),
        }
        for seed, mask in ((2, mask_of(12, 7, size=12)), (3, mask_of(3, 3, size=12)))
    ]
    return transformer, calls


def helios(channels: int = 4) -> Built:
    """Helios: history of 5 x 4 x 4 + 2 x 8 x 8 in three scales, then 3 x 8 x 8; two calls."""
    torch.manual_seed(0)
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(8, 8, 8),
        is_amplify_history=True,
    ).eval()
    history = {
        "indices_hidden_states": torch.arange(7, 10)[None],
        "indices_latents_history_long": torch.arange(4)[None],
        "latents_history_long": randn(1, 4, 4, 16, 16, seed=4),
        "indices_latents_history_mid": torch.arange(4, 6)[None],
        "latents_history_mid": randn(1, 4, 2, 16, 16, seed=5),
        "indices_latents_history_short": torch.arange(6, 7)[None],
        "latents_history_short": randn(1, 4, 1, 16, 16, seed=6),
    }
    calls = [
        {
            "hidden_states": randn(1, 4, 3, 16, 16),
            "encoder_hidden_states": randn(1, 12, 32, seed=seed),
            "timestep": torch.full((1,), 700),
            **history,
        }
        for seed in (2, 3)
    ]
    return transformer, calls


def minimax_h3() -> Built:
    """MiniMax-H3: from text, between two keyframes, and with an image and a video as references.

    12 text tokens, conditions, 2 x 5 of sound, then 3 x 8 x 8 of video; one layout for a batch, which the
    host's own steps make.
    """
    torch.manual_seed(0)
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        text_dim=32,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    ).eval()
    sizes = (torch.ones(12), 3, 16, 16, 5, (1, 2, 2), 2, 2, 0)
    text, *rest = sizes
    references = (
        [SimpleNamespace(kind="image"), SimpleNamespace(kind="video", has_audio=True)],
        [torch.empty(1, 4, 1, 8, 12), torch.empty(1, 4, 2, 16, 16)],
        [torch.empty(2 * 4, 4)],
    )
    between = MiniMaxH3PrepareLayoutStep.build_packed_sequence
    packed = (
        between(*sizes),
        between(*sizes, ("first", "last")),
        MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(text, *references, *rest),
    )
    return transformer, [_minimax_h3_call(*rows) for rows in packed]


def _minimax_h3_call(
    positions: Tensor,
    tags: Tensor,
    video: Tensor,
    audio: Tensor,
    text: Tensor,
    given_video: int,
    given_audio: int,
) -> dict[str, Any]:
    levels = MiniMaxH3SetTimestepsStep.build_row_timesteps
    rows = (video, audio, given_video, given_audio, len(text))
    timestep, indices = levels(*rows, 0.3, 0.6, 0.999, 1.0)
    return {
        "hidden_states": randn(2, len(video), 96),
        "audio_hidden_states": randn(2, len(audio), 32),
        "encoder_hidden_states": randn(2, len(text), 32, seed=2),
        "timestep": timestep,
        "timestep_indices": indices,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


BUILDERS: dict[str, Callable[[], Built]] = {
    "wan_i2v": wan_i2v,
    "wan_ti2v": wan_ti2v,
    "wan_vace": wan_vace,
    "wan_animate": wan_animate,
    "skyreels": skyreels,
    "chronoedit": chronoedit,
    "cogvideox15": cogvideox15,
    "consisid": consisid,
    "hunyuan_i2v": hunyuan_i2v,
    "framepack": framepack,
    "hunyuan15": hunyuan15,
    "ltx2": ltx2,
    "mochi": mochi,
    "allegro": allegro,
    "easyanimate": easyanimate,
    "cosmos": cosmos,
    "cosmos1": cosmos1,
    "anyflow": anyflow,
    "joyimage": joyimage,
    "kandinsky": kandinsky,
    "kandinsky6": kandinsky6,
    "motif": motif,
    "helios": helios,
    "minimax_h3": minimax_h3,
}


def run(transformer: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    """The video output of each forward."""
    with torch.no_grad():
        return [transformer(return_dict=False, **call)[0] for call in calls]
