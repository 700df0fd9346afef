"""A starting plan for Wan 2.1 T2V 14B from its geometry; nothing measured."""

from ready import Published, main

from sparse_dit.layout import TokenLayout

MODEL = Published(
    name="wan2.1-t2v-14b-geometry",
    title="Wan 2.1 T2V 14B",
    model="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    pipeline_class="WanPipeline",
    model_class="WanTransformer3DModel",
    num_heads=40,
    head_dim=128,
    layers=tuple(f"blocks.{i}.attn1" for i in range(40)),
    layout=TokenLayout.video(21, 45, 80),
    height=720,
    width=1280,
    num_frames=81,
    steps=50,
    guidance=5.0,
    shift=5.0,
    sources="diffusers' conversion script convert_wan_to_diffusers.py and WanPipeline's defaults",
)

if __name__ == "__main__":
    main(MODEL, __file__)
