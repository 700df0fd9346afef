"""A starting plan for HunyuanVideo from its geometry; nothing measured."""

from ready import Published, main

from sparse_dit.layout import TokenLayout

MODEL = Published(
    name="hunyuanvideo-geometry",
    title="HunyuanVideo (text to video)",
    model="hunyuanvideo-community/HunyuanVideo",
    pipeline_class="HunyuanVideoPipeline",
    model_class="HunyuanVideoTransformer3DModel",
    num_heads=24,
    head_dim=128,
    layers=(
        *(f"transformer_blocks.{i}.attn" for i in range(20)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(40)),
    ),
    layout=TokenLayout.video(33, 45, 80, text_after=256),
    height=720,
    width=1280,
    num_frames=129,
    steps=50,
    guidance=6.0,
    shift=7.0,
    sources=(
        "the defaults of diffusers' HunyuanVideoTransformer3DModel and HunyuanVideoPipeline, its "
        "conversion script convert_hunyuan_video_to_diffusers.py"
    ),
)

if __name__ == "__main__":
    main(MODEL, __file__)
