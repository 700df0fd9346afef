"""A starting plan for CogVideoX1.5 5B from its geometry; nothing measured."""

from ready import Published, main

from sparse_dit.layout import TokenLayout

MODEL = Published(
    name="cogvideox1.5-5b-geometry",
    title="CogVideoX1.5 5B",
    model="zai-org/CogVideoX1.5-5B",
    pipeline_class="CogVideoXPipeline",
    model_class="CogVideoXTransformer3DModel",
    num_heads=48,
    head_dim=64,
    layers=tuple(f"transformer_blocks.{i}.attn1" for i in range(42)),
    layout=TokenLayout.video(11, 48, 85, text_before=226),
    height=768,
    width=1360,
    num_frames=81,
    steps=50,
    guidance=6.0,
    shift=1.0,
    sources="diffusers' conversion script convert_cogvideox_to_diffusers.py and the model's own card",
)

if __name__ == "__main__":
    main(MODEL, __file__)
