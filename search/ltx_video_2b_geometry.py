"""A starting plan for LTX-Video 2B from its geometry; nothing measured."""

from ready import Published, main

from sparse_dit.layout import TokenLayout

MODEL = Published(
    name="ltx-video-2b-geometry",
    title="LTX-Video 2B",
    model="Lightricks/LTX-Video",
    pipeline_class="LTXPipeline",
    model_class="LTXVideoTransformer3DModel",
    num_heads=32,
    head_dim=64,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(28)),
    layout=TokenLayout.video(21, 16, 22),
    height=512,
    width=704,
    num_frames=161,
    steps=50,
    guidance=3.0,
    shift=25.285,  # exp(mu) of the pipeline's calculate_shift at 7,392 tokens
    sources=(
        "the defaults of diffusers' LTXVideoTransformer3DModel and LTXPipeline, its conversion script "
        "convert_ltx_to_diffusers.py"
    ),
    terminal=0.1,
    tile=(1, 4, 4),
)

if __name__ == "__main__":
    main(MODEL, __file__)
