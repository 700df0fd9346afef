"""Tiny random transformers whose layers attend to keys of a prompt that is no query there.

Every builder returns `(transformer, arguments)`: 3 x 4 x 6 tokens of video or 4 x 6 of an image, noise 0.25.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

Built = tuple[Any, dict[str, Any]]


def qwen21() -> Built:
    """Qwen-Image 2.1: two prompts of 7 and 4 tokens, padded, then an image."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(2, 24, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "timestep": torch.full((2,), 0.25),
        "img_shapes": [[(1, 4, 6)]] * 2,
        "img_mask": (torch.arange(7 + 6) >= 7).expand(2, -1),
    }


def cosmos3() -> Built:
    """Cosmos 3: a prompt of 7 tokens, an image of 2 x 3, a video, its sound of 5; two queries to a key."""
    torch.manual_seed(0)
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        rope_axes_dim=(4, 2, 2),
        vocab_size=20,
        sound_gen=True,
        sound_dim=4,
    ).eval()
    shapes, text = [(1, 2, 3), (3, 4, 6)], 7
    image, video, sound = 6, 72, 5
    start = text + image
    places = torch.arange(text, start + video)
    return transformer, {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(start + video + sound).float().expand(3, -1),
        "und_len": text,
        "sequence_length": start + video + sound,
        "vision_tokens": [torch.randn(1, 4, t, 2 * h, 2 * w) for t, h, w in shapes],
        "vision_token_shapes": shapes,
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places[image:],
        "vision_timesteps": torch.full((video,), 250.0),
        "vision_noisy_frame_indexes": [torch.arange(0), torch.arange(3)],
        "sound_tokens": [torch.randn(4, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": torch.arange(start + video, start + video + sound),
        "sound_mse_loss_indexes": torch.arange(start + video, start + video + sound),
        "sound_timesteps": torch.full((sound,), 250.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }
