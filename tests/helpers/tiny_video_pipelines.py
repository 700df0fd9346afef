"""Tiny random video pipelines beside those of `tests.helpers.tiny_pipelines`, and a default call for each.

Every one of `PIPELINES` returns `(pipe, call)` as there, for two prompts where the host takes them, with
embeddings in place of text and image encoders: two steps of 3 frames of 8 x 8 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import PIL.Image
import torch
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3CoreDenoiseStep,
)
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from tests.helpers import tiny_video_models as models
from tests.helpers.tiny_pipelines import cogvideox, hunyuan_video, ltx, wan
from tests.helpers.tiny_video_models import COG, HUNYUAN, mask_of, randn, wan_like

Pipeline = tuple[Any, dict[str, Any]]
SMALL = {"height": 64, "width": 64}  # 4 x 4 tokens, where a VAE has much to do
IMAGE = PIL.Image.new("RGB", (128, 128), (200, 120, 40))


def _finish(pipe: Any, call: dict[str, Any]) -> Pipeline:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "latent"}
    return pipe, {**size, **call}


def mochi_pipeline() -> Pipeline:
    """Mochi with the scheduler of its checkpoint, which inverts noise levels."""
    transformer, _ = models.mochi()
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    call = {
        "prompt_embeds": randn(2, 12, 32),
        "prompt_attention_mask": mask_of(7, 12, size=12).bool(),
        "negative_prompt_embeds": randn(2, 12, 32, seed=2),
        "negative_prompt_attention_mask": mask_of(0, 0, size=12).bool(),
        "num_frames": 13,
    }
    return _finish(pipe, call)


def allegro_pipeline() -> Pipeline:
    """Allegro, guidance batched."""
    transformer, _ = models.allegro()
    pipe = diffusers.AllegroPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )
    call = {
        "prompt_embeds": randn(2, 12, 32),
        "prompt_attention_mask": mask_of(7, 12, size=12),
        "negative_prompt": None,
        "negative_prompt_embeds": randn(2, 12, 32, seed=2),
        "negative_prompt_attention_mask": mask_of(3, 3, size=12),
        "num_frames": 12,
    }
    return _finish(pipe, call)


def skyreels_pipeline() -> Pipeline:
    """SkyReels-V2, cond and uncond in two calls."""
    transformer, _ = models.skyreels()
    pipe = diffusers.SkyReelsV2Pipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0),
    )
    call = {
        "prompt_embeds": randn(2, 12, 32),
        "negative_prompt_embeds": randn(2, 12, 32, seed=2),
        "num_frames": 9,
    }
    return _finish(pipe, call)


def hunyuan15_pipeline() -> Pipeline:
    """HunyuanVideo 1.5, text to video: cond and uncond in two calls by a guider."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **{**HUNYUAN, "num_layers": 2, "in_channels": 9}, text_embed_2_dim=16, image_embed_dim=16
    ).eval()
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ).eval()
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    call = {
        "prompt_embeds": randn(2, 12, 32),
        "prompt_embeds_mask": mask_of(7, 12, size=12),
        "negative_prompt_embeds": randn(2, 12, 32, seed=2),
        "negative_prompt_embeds_mask": mask_of(3, 3, size=12),
        "prompt_embeds_2": randn(2, 6, 16),
        "prompt_embeds_mask_2": mask_of(0, 4, size=6),
        "negative_prompt_embeds_2": randn(2, 6, 16, seed=2),
        "negative_prompt_embeds_mask_2": mask_of(0, 0, size=6),
        "num_frames": 9,
    }
    return _finish(pipe, call)


def vace_pipeline() -> Pipeline:
    """Wan VACE with a grey control video, cond and uncond in two calls."""
    transformer, _ = wan_like("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96)
    parts = {k: wan()[0].components[k] for k in ("vae", "tokenizer", "text_encoder")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanVACEPipeline(**parts, transformer=transformer, scheduler=scheduler)
    call = {
        "prompt_embeds": randn(1, 12, 32),
        "negative_prompt_embeds": randn(1, 12, 32, seed=2),
        "num_frames": 9,
        **SMALL,
    }
    return _finish(pipe, call)


def anyflow_pipeline() -> Pipeline:
    """AnyFlow, which its distillation spares the guidance."""
    transformer, _ = models.anyflow()
    parts = {k: wan()[0].components[k] for k in ("vae", "tokenizer", "text_encoder")}
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    pipe = diffusers.AnyFlowPipeline(**parts, transformer=transformer, scheduler=scheduler)
    call = {"prompt_embeds": randn(2, 12, 32), "num_frames": 9}
    return _finish(pipe, call)


def _texts(batch: int = 2, length: int = 12) -> dict[str, Any]:
    """Embeddings of both branches."""
    return {
        "prompt_embeds": randn(batch, length, 32),
        "negative_prompt_embeds": randn(batch, length, 32, seed=2),
    }


def _masks(batch: int = 2) -> dict[str, Any]:
    lengths = (7, 12)[:batch]
    return {
        "prompt_attention_mask": mask_of(*lengths, size=12),
        "negative_prompt_attention_mask": mask_of(*[3] * batch, size=12),
    }


class _Safe(torch.nn.Module):
    """In place of a guard that is an installation of its own; it judges prompts and pixels alone."""

    device = torch.device("cpu")
    dtype = torch.float32


class _Magvit(_Safe):
    """A VAE of which the pipeline needs no more than its sizes."""

    spatial_compression_ratio = 8
    temporal_compression_ratio = 4
    config = diffusers.configuration_utils.FrozenDict(latent_channels=4)


def _encoded(image: Any, device: Any) -> torch.Tensor:
    """In place of a pipeline's `encode_image`."""
    return randn(1, 5, 16)


def _wan_parts() -> dict[str, Any]:
    """A VAE of 16 channels, and no encoders."""
    return {
        "vae": wan()[0].vae,
        "tokenizer": None,
        "text_encoder": None,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def wan_i2v_pipeline() -> Pipeline:
    """Wan 2.1 image to video: the image's latents beside the video's, and its embeddings as keys."""
    transformer, _ = models.wan_i2v()
    pipe = diffusers.WanImageToVideoPipeline(
        **_wan_parts(), transformer=transformer, image_encoder=None, image_processor=None
    )
    pipe.encode_image = _encoded
    return _finish(pipe, {**_texts(length=512), "image": IMAGE, "num_frames": 9})


def wan_ti2v_pipeline() -> Pipeline:
    """Wan 2.2 TI2V (5B): a timestep for each token, 0 in the frame that is given."""
    transformer, _ = models.wan_ti2v()
    pipe = diffusers.WanImageToVideoPipeline(
        **_wan_parts(), transformer=transformer, expand_timesteps=True
    )
    return _finish(pipe, {**_texts(), "image": IMAGE, "num_frames": 9})


def wan_animate_pipeline() -> Pipeline:
    """Wan Animate: two segments, the reference image as a frame of its own before each."""
    transformer, _ = models.wan_animate()
    pipe = diffusers.WanAnimatePipeline(
        **_wan_parts(), transformer=transformer, image_encoder=None, image_processor=None
    )
    pipe.encode_image = _encoded
    call = {
        **_texts(1, length=512),
        "image": IMAGE,
        "pose_video": [IMAGE] * 9,
        "face_video": [IMAGE.resize((16, 16))] * 9,
        "segment_frame_length": 5,
        **SMALL,
        "guidance_scale": 2.0,
    }
    return _finish(pipe, call)


def chronoedit_pipeline() -> Pipeline:
    """ChronoEdit with a step of temporal reasoning: 3 frames, then the first and the last alone."""
    transformer, _ = models.chronoedit()
    parts = {
        **_wan_parts(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    pipe = diffusers.ChronoEditPipeline(
        **parts, transformer=transformer, image_encoder=None, image_processor=None
    )
    pipe.encode_image = _encoded
    call = {
        **_texts(1, length=512),
        "image": IMAGE,
        "num_frames": 9,
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": 1,
    }
    return _finish(pipe, call)


def cogvideox_i2v_pipeline() -> Pipeline:
    """CogVideoX 1.5 image to video: pairs of latent frames, latents of the image in its channels."""
    torch.manual_seed(0)
    config = {**COG, "in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 2}
    transformer = diffusers.CogVideoXTransformer3DModel(**config).eval()
    pipe = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=cogvideox()[0].vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return _finish(pipe, {**_texts(), "image": [IMAGE] * 2, "num_frames": 13})


def consisid_pipeline() -> Pipeline:
    """ConsisID with what its face models would give."""
    transformer, _ = models.consisid(in_channels=8)
    pipe = ConsisIDPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=cogvideox()[0].vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDPMScheduler(),
    )
    call = {
        **_texts(),
        "image": [IMAGE] * 2,
        "id_cond": randn(4, 2),
        "id_vit_hidden": [randn(4, 2, 2)],
        "num_frames": 9,
    }
    return _finish(pipe, call)


def _hunyuan_texts(batch: int) -> dict[str, Any]:
    return {
        **_texts(batch),
        **_masks(batch),
        "pooled_prompt_embeds": randn(batch, 32),
        "negative_pooled_prompt_embeds": randn(batch, 32, seed=2),
        "true_cfg_scale": 3.0,
        "guidance_scale": 1.0,
        "image": [IMAGE] * batch,
    }


def hunyuan_i2v_pipeline() -> Pipeline:
    """HunyuanVideo image to video, whose first frame is replaced; guidance in two calls."""
    transformer, _ = models.hunyuan_i2v()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(
        **parts,
        transformer=transformer,
        vae=hunyuan_video()[0].vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_processor=None,
    )
    return _finish(pipe, {**_hunyuan_texts(2), "num_frames": 9})


def framepack_pipeline() -> Pipeline:
    """FramePack: two sections, each with the history of the one before; guidance in two calls."""
    transformer, _ = models.framepack()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        **parts,
        transformer=transformer,
        vae=hunyuan_video()[0].vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_encoder=None,
        feature_extractor=None,
    )
    pipe.encode_image = _encoded
    return _finish(pipe, {**_hunyuan_texts(1), "num_frames": 18, "latent_window_size": 3})


def ltx2_pipeline() -> Pipeline:
    """LTX 2 with sound; guidance batched, then the prompt with a perturbed layer, then without sound."""
    transformer, _ = models.ltx2(perturbed_attn=True)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
        patch_size_t=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    connector = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1}
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=1,
        **{f"video_connector_{k}": v for k, v in connector.items()},
        **{f"audio_connector_{k}": v for k, v in connector.items()},
        video_connector_num_learnable_registers=None,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )
    pipe = diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=transformer,
        vocoder=None,
    )
    call = {**_texts(), **_masks(), "num_frames": 5, "height": 32, "width": 32}
    return _finish(pipe, {**call, "spatio_temporal_guidance_blocks": [1]})


def ltx_condition_pipeline() -> Pipeline:
    """LTX with a keyframe, whose tokens come first, and coordinates in place of a grid."""
    parts, call = ltx()
    pipe = diffusers.LTXConditionPipeline(**parts.components)
    frames = [LTXVideoCondition(image=IMAGE, frame_index=index) for index in (0, 8)]
    return _finish(
        pipe, {**call, "height": 32, "width": 32, "num_frames": 17, "conditions": frames}
    )


def ltx_long_pipeline() -> Pipeline:
    """LTX in two windows, a guiding frame out of turn at the end of each; sizes that say 1 x 1 x 1."""
    parts, call = ltx()
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(
        **{**parts.components, "scheduler": diffusers.LTXEulerAncestralRFScheduler()}
    )
    call = {
        **{name: call[name] for name in ("prompt", "negative_prompt", "guidance_scale")},
        "height": 32,
        "width": 32,
        "num_frames": 25,
        "temporal_tile_size": 16,
        "temporal_overlap": 4,
        "num_inference_steps": 3,  # it leaves out the last one
    }
    return _finish(pipe, call)


def easyanimate_pipeline() -> Pipeline:
    """EasyAnimate, guidance batched."""
    transformer, _ = models.easyanimate(text_embed_dim_t5=None)
    pipe = diffusers.EasyAnimatePipeline(
        vae=_Magvit(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return _finish(pipe, {**_texts(), **_masks(), "num_frames": 9})


def cosmos1_pipeline() -> Pipeline:
    """Cosmos 1, text to world; guidance in two calls."""
    transformer, _ = models.cosmos1()
    pipe = diffusers.CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        safety_checker=_Safe(),
    )
    return _finish(pipe, {**_texts(), "num_frames": 17})


def cosmos2_pipeline() -> Pipeline:
    """Cosmos 2, video to world: the given frame has a noise level of its own."""
    transformer, _ = models.cosmos(in_channels=17, out_channels=16)
    pipe = diffusers.Cosmos2VideoToWorldPipeline(
        **{
            **_wan_parts(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        },
        transformer=transformer,
        safety_checker=_Safe(),
    )
    return _finish(pipe, {**_texts(1), "image": IMAGE, "num_frames": 9})


def cosmos25_pipeline() -> Pipeline:
    """Cosmos 2.5, from two latent frames that are given."""
    transformer, _ = models.cosmos(in_channels=17, out_channels=16)
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(
        **_wan_parts(), transformer=transformer, safety_checker=_Safe()
    )
    return _finish(pipe, {**_texts(1), "video": [IMAGE] * 5, "num_frames": 9})


def kandinsky_pipeline() -> Pipeline:
    """Kandinsky 5, guidance in two calls."""
    transformer, _ = models.kandinsky()
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    texts = {}
    for seed, prefix in enumerate(("", "negative_")):
        texts[f"{prefix}prompt_embeds_qwen"] = randn(1, 12, 32, seed=seed)
        texts[f"{prefix}prompt_embeds_clip"] = randn(1, 16, seed=seed)
        texts[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 12], dtype=torch.int32)
    return _finish(pipe, {**texts, "num_frames": 9})


def motif_pipeline() -> Pipeline:
    """Motif-Video with a decoder layer, guidance in two calls by a guider."""
    transformer, _ = models.motif(
        in_channels=33, out_channels=16, num_single_layers=2, num_decoder_layers=1
    )
    pipe = diffusers.MotifVideoPipeline(
        **_wan_parts(), transformer=transformer, guider=diffusers.ClassifierFreeGuidance(3.0)
    )
    return _finish(pipe, {**_texts(), **_masks(), "num_frames": 9})


def helios_pipeline() -> Pipeline:
    """Helios: two chunks, the second with the first as its history; guidance in two calls."""
    transformer, _ = models.helios(channels=16)
    pipe = diffusers.HeliosPipeline(
        **{**_wan_parts(), "scheduler": diffusers.HeliosScheduler(stages=1)},
        transformer=transformer,
    )
    call = {
        **_texts(1),
        "num_frames": 18,
        "num_latent_frames_per_chunk": 3,
        "history_sizes": [4, 2, 1],
        **SMALL,
    }
    return _finish(pipe, call)


def helios_pyramid_pipeline() -> Pipeline:
    """Helios at three sizes, one after the other, each from the noise level where the last one ended."""
    transformer, _ = models.helios(channels=16)
    pipe = diffusers.HeliosPyramidPipeline(
        # with a gamma of 1/3 the host factors a singular matrix, which on some machines fails
        **{**_wan_parts(), "scheduler": diffusers.HeliosScheduler(gamma=0.3)},
        transformer=transformer,
    )
    call = {
        **_texts(1),
        "num_frames": 9,
        "num_latent_frames_per_chunk": 3,
        "history_sizes": [4, 2, 1],
        "pyramid_num_inference_steps_list": [1, 1, 1],
    }
    pipe, call = _finish(pipe, call)
    return pipe, {name: value for name, value in call.items() if name != "num_inference_steps"}


def skyreels_forcing_pipeline() -> Pipeline:
    """SkyReels-V2 with diffusion forcing: later frames start later."""
    transformer, _ = models.skyreels()
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=wan()[0].vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )
    call = {**_texts(), "prompt": None, "num_frames": 9, "base_num_frames": 9, "ar_step": 1}
    return _finish(pipe, {**call, "causal_block_size": 1})


def ltx2_condition_pipeline() -> Pipeline:
    """LTX 2 with a keyframe, whose tokens are appended."""
    parts, call = ltx2_pipeline()
    pipe = diffusers.LTX2ConditionPipeline(**parts.components)
    frames = [LTX2VideoCondition(frames=IMAGE, index=index, crf=0) for index in (0, 2)]
    return _finish(pipe, {**call, **_texts(1), **_masks(1), "conditions": frames})


def minimax_h3_pipeline() -> Pipeline:
    """MiniMax-H3 from text, its denoising blocks: 37 x 4 x 4 beside 2 x 207 tokens of sound."""
    transformer, _ = models.minimax_h3()
    pipe = MiniMaxH3CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=transformer,
        scheduler=diffusers.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    text = {"prompt_embeds": randn(1, 12, 32), "text_token_tags": torch.ones(12)}
    call = {**text, "num_frames": 124, "num_inference_steps": 3, "output": "latents"}
    pipe, call = _finish(pipe, call)
    return pipe, {name: value for name, value in call.items() if name != "output_type"}


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "mochi": mochi_pipeline,
    "allegro": allegro_pipeline,
    "skyreels": skyreels_pipeline,
    "hunyuan15": hunyuan15_pipeline,
    "wan_vace": vace_pipeline,
    "anyflow": anyflow_pipeline,
    "wan_i2v": wan_i2v_pipeline,
    "wan_ti2v": wan_ti2v_pipeline,
    "wan_animate": wan_animate_pipeline,
    "chronoedit": chronoedit_pipeline,
    "cogvideox_i2v": cogvideox_i2v_pipeline,
    "consisid": consisid_pipeline,
    "hunyuan_i2v": hunyuan_i2v_pipeline,
    "framepack": framepack_pipeline,
    "ltx_condition": ltx_condition_pipeline,
    "ltx_long": ltx_long_pipeline,
    "ltx2": ltx2_pipeline,
    "easyanimate": easyanimate_pipeline,
    "cosmos1": cosmos1_pipeline,
    "cosmos2": cosmos2_pipeline,
    "cosmos25": cosmos25_pipeline,
    "kandinsky": kandinsky_pipeline,
    "motif": motif_pipeline,
    "helios": helios_pipeline,
    "helios_pyramid": helios_pyramid_pipeline,
    "skyreels_forcing": skyreels_forcing_pipeline,
    "ltx2_condition": ltx2_condition_pipeline,
    "minimax_h3": minimax_h3_pipeline,
}
