"""Tiny random pipelines of each supported family, built offline, and a default call for each.

Every builder returns `(pipe, call)`: weights depend on `seed` alone, `call` are the pipeline's
arguments (two steps, latents as output) but for the generator, which `generate` adds.
"""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

SENTENCES = (
    "A red circle moves left over gray stripes.",
    "A cat plays the piano in a sunny room.",
    "Describe the video by detailing the following aspects.",
    "The camera pans slowly across a quiet harbour at dawn.",
)
PROMPT = "a cat plays the piano"
HUNYUAN_TEMPLATE = {"template": "Describe {}", "crop_start": 1}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE trained on four sentences; it stands in for T5, CLIP and Llama ones."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=77,
        padding_side="right",
    )


def _t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def _clip() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config).eval()


def _finish(pipe: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", **call}


def wan(seed: int = 0, num_layers: int = 2, second: bool = False) -> tuple[Any, dict[str, Any]]:
    """Wan: video tokens alone (5 x 4 x 4), cond and uncond in two calls."""
    torch.manual_seed(seed)

    def transformer() -> diffusers.WanTransformer3DModel:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=num_layers,
            rope_max_seq_len=32,
        ).eval()

    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5("UMT5"),
        vae=vae,
        transformer=transformer(),
        transformer_2=transformer() if second else None,
        boundary_ratio=0.9 if second else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    size = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16}
    return _finish(pipe, {**size, "negative_prompt": "", "guidance_scale": 3.0})


def cogvideox(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """CogVideoX: 16 text tokens, then 3 x 4 x 4; guidance batched; SDPA called directly."""
    torch.manual_seed(seed)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    ).eval()
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    size = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    return _finish(pipe, {**size, "negative_prompt": "", "guidance_scale": 3.0})


def hunyuan_video(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo: 3 x 4 x 4, then 16 text tokens of which some are padding; one call a step."""
    torch.manual_seed(seed)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    vae = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    llama = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    size = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    return _finish(pipe, {**size, "prompt_template": HUNYUAN_TEMPLATE})


def ltx(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """LTX: 3 x 8 x 8 packed video tokens, guidance batched."""
    torch.manual_seed(seed)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=tokenizer(),
        transformer=transformer,
    )
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    return _finish(pipe, {**size, "negative_prompt": "", "guidance_scale": 3.0})


def flux(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Flux: 48 text tokens, then 16 x 16 image tokens; one call a step."""
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        sample_size=32,
    ).eval()
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_clip(),
        tokenizer=tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
    )
    return _finish(pipe, {"height": 32, "width": 32, "max_sequence_length": 48})


BUILDERS = {
    "wan": wan,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "flux": flux,
}


def generate(pipe: Any, call: dict[str, Any], seed: int = 0, **overrides: Any) -> torch.Tensor:
    """The pipeline's latents of its default call."""
    generator = torch.Generator().manual_seed(seed)
    output = pipe(**{**call, **overrides}, generator=generator)
    if isinstance(output, torch.Tensor):  # of a modular pipeline, whose call names what it gives
        return output
    video = output.images if hasattr(output, "images") else output.frames
    return (
        video[-1] if isinstance(video, list) else video
    )  # FramePack: what there is after each section
