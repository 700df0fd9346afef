"""A starting plan for Wan 2.1 T2V 1.3B from its geometry; nothing measured."""

from ready import Published, main

from sparse_dit.layout import TokenLayout

MODEL = Published(
    name="wan2.1-t2v-1.3b-geometry",
    title="Wan 2.1 T2V 1.3B",
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    pipeline_class="WanPipeline",
    model_class="WanTransformer3DModel",
    num_heads=12,
    head_dim=128,
    layers=tuple(f"blocks.{i}.attn1" for i in range(30)),
    layout=TokenLayout.video(21, 30, 52),
    height=480,
    width=832,
    num_frames=81,
    steps=50,
    guidance=5.0,
    shift=3.0,
    sources="diffusers' conversion script convert_wan_to_diffusers.py and WanPipeline's defaults",
)

if __name__ == "__main__":
    main(MODEL, __file__)
