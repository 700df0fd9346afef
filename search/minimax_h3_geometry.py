"""A starting plan for MiniMax-H3 from its geometry; nothing measured."""

from ready import Published, main

from sparse_dit.layout import TokenLayout

FRAMES, SOUND = 37, 2 * 207  # of 124 frames at 24 a second: 17 k + 5 frames make 5 k + 2 of tokens
PROMPT = 256  # tokens of text; it has no fixed length

MODEL = Published(
    name="minimax-h3-geometry",
    title="MiniMax-H3 (video with sound from text)",
    model="MiniMaxAI/MiniMax-H3",
    pipeline_class="MiniMaxH3ModularPipeline",
    model_class="MiniMaxH3Transformer3DModel",
    num_heads=56,
    head_dim=128,
    layers=tuple(f"transformer_blocks.{i}.attn" for i in range(50)),
    layout=TokenLayout.video(FRAMES, 24, 42, text_before=PROMPT + SOUND),
    height=768,
    width=1344,
    num_frames=124,
    steps=50,
    guidance=1.0,
    shift=12.0,
    sources=(
        "the defaults of diffusers' MiniMaxH3Transformer3DModel, MiniMaxH3Scheduler and MiniMaxH3Blocks; "
        "prompts of 256 tokens are assumed; sound counts as text"
    ),
)

if __name__ == "__main__":
    main(MODEL, __file__)
