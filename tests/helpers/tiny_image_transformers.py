"""Tiny random image transformers whose pipelines are not built here, and the arguments of a forward.

Every builder returns `(transformer, arguments)`: two items with a 4 x 6 image each, texts of different
lengths where the model is told lengths, and noise level 0.25.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor

Built = tuple[Any, dict[str, Any]]


def _ids(start: int = 0, image: int = 0) -> Tensor:
    """Image number, row and column of a 4 x 6 image."""
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 6)))
    return (ids + torch.tensor([image, start, start])).float()


def _flux_like(kind: str, timestep: float, ids: Tensor, **config: Any) -> Built:
    torch.manual_seed(0)
    transformer = getattr(diffusers, kind)(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        **config,
    )
    return transformer.eval(), {
        "hidden_states": torch.randn(2, len(ids), 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.full((2,), timestep),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
    }


def longcat() -> Built:
    """LongCat-Image: image 1 starts at row and column 512; image 2 is what is edited."""
    ids = torch.cat([_ids(512, 1), _ids(512, 2)[:10]])
    return _flux_like("LongCatImageTransformer2DModel", 0.25, ids, pooled_projection_dim=32)


def ovis() -> Built:
    """Ovis-Image."""
    return _flux_like("OvisImageTransformer2DModel", 0.25, _ids(), out_channels=16)


def bria() -> Built:
    """Bria."""
    return _flux_like("BriaTransformer2DModel", 250.0, _ids())


def bria_fibo() -> Built:
    """Bria Fibo: text that is masked, before the image."""
    transformer, inputs = _flux_like(
        "BriaFiboTransformer2DModel", 250.0, _ids(), text_encoder_dim=16
    )
    mask = torch.ones(2, 7 + 24, dtype=torch.bool)
    mask[1, 4:7] = False
    inputs["text_encoder_layers"] = [torch.randn(2, 7, 16) for _ in range(2)]
    inputs["joint_attention_kwargs"] = {"attention_mask": mask[:, None, None, :]}
    return transformer, inputs


def krea2() -> Built:
    """Krea 2: text that is masked, before the image."""
    torch.manual_seed(0)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )
    return transformer.eval(), {
        "hidden_states": torch.randn(2, 24, 16),
        "encoder_hidden_states": torch.randn(2, 7, 2, 32),
        "timestep": torch.full((2,), 0.25),
        "position_ids": torch.cat([torch.zeros(7, 3), _ids()]),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
    }


def auraflow() -> Built:
    """AuraFlow: eight registers and the text, then the image."""
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return transformer.eval(), {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.full((2,), 0.25),
    }


_SIZES = {"target_size": torch.tensor([[64.0, 96.0]] * 2), "crop_coords": torch.zeros(2, 2)}
_COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 32,
    "time_embed_dim": 16,
    "condition_dim": 8,
}


def cogview3() -> Built:
    """CogView 3 Plus."""
    torch.manual_seed(0)
    transformer = diffusers.CogView3PlusTransformer2DModel(
        **_COGVIEW, sample_size=16, pos_embed_max_size=16
    )
    return transformer.eval(), {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.full((2,), 250),
        "original_size": _SIZES["target_size"],
        **_SIZES,
    }


def glm() -> Built:
    """GLM-Image, with a mask that it adds to the logits."""
    torch.manual_seed(0)
    transformer = diffusers.GlmImageTransformer2DModel(
        **_COGVIEW, prior_vq_quantizer_codebook_size=16
    )
    return transformer.eval(), {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "prior_token_id": torch.randint(0, 16, (2, 24)),
        "prior_token_drop": torch.tensor([False, True]),
        "timestep": torch.full((2,), 250),
        "attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])).float(),
        **_SIZES,
    }


def ernie() -> Built:
    """ERNIE-Image: padding of the text last."""
    torch.manual_seed(0)
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=24,
        rope_axes_dim=(4, 4, 8),
    )
    with torch.no_grad():  # the host starts these at zero, and everything after them
        transformer.adaLN_modulation[-1].weight.normal_(std=0.3)
        transformer.final_linear.weight.normal_()
    return transformer.eval(), {
        "hidden_states": torch.randn(2, 16, 4, 6),
        "timestep": torch.full((2,), 250),
        "text_bth": torch.randn(2, 7, 24),
        "text_lens": torch.tensor([7, 4]),
    }


def flux3() -> Built:
    """Flux3: layers of the image alone, then with text and 10 tokens of an image that is edited."""
    torch.manual_seed(0)
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()
    ids = torch.cat([_ids(), torch.zeros(24, 1)], 1)
    return transformer, {
        "hidden_states": torch.randn(2, 24, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.full((2,), 0.25),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 4),
        "image_cond_hidden_states": torch.randn(2, 10, 16),
        "image_cond_ids": ids[:10] + torch.tensor([10.0, 0, 0, 0]),
    }


def dit() -> Built:
    """DiT: classes, no text."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.full((2,), 250.0),
        "class_labels": torch.tensor([3, 5]),
    }


def hunyuan_dit() -> Built:
    """Hunyuan-DiT: text of two encoders by cross-attention."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=4,
        text_len_t5=5,
        use_style_cond_and_image_meta_size=False,
    ).eval()
    positions = get_2d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), output_type="pt")
    return transformer, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.full((2,), 250.0),
        "encoder_hidden_states": torch.randn(2, 4, 32),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": torch.randn(2, 5, 32),
        "text_embedding_mask_t5": torch.ones(2, 5),
        "image_rotary_emb": positions,
    }


TWO_TEXTS = torch.arange(7) < torch.tensor([[7], [4]])


def prx() -> Built:
    """PRX: keys of masked text before those of the image."""
    torch.manual_seed(0)
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=32, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
    ).eval()
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:  # the host starts them at zero: no layer would do anything
            torch.nn.init.normal_(parameter, std=0.3)
    return transformer, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.full((2,), 0.25),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "attention_mask": TWO_TEXTS,
    }


def nucleus() -> Built:
    """Nucleus-Image: keys of masked text after those of the image, two queries to a key."""
    torch.manual_seed(0)
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(2, 24, 16),
        "img_shapes": [(1, 4, 6)] * 2,
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_hidden_states_mask": TWO_TEXTS,
        "timestep": torch.full((2,), 0.25),
    }


def ideogram(lengths: tuple[int, ...] = (7, 7)) -> Built:
    """Ideogram 4: texts of these lengths, padded before them, then the image."""
    torch.manual_seed(0)
    transformer = diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=32,
        mrope_section=(4, 2, 2),
    ).eval()
    ids = diffusers.Ideogram4Pipeline._prepare_ids(list(lengths), 4, 6, 7, torch.device("cpu"))
    return transformer, {
        "hidden_states": torch.randn(2, 31, 16),
        "timestep": torch.full((2,), 0.75),
        "encoder_hidden_states": torch.randn(2, 31, 32),
        **dict(zip(("position_ids", "segment_ids", "indicator"), ids, strict=True)),
    }


def joyimage_plus() -> Built:
    """JoyImage Edit Plus: edited images of 3 and 1 tokens after the image, padded, then masked text."""
    torch.manual_seed(0)
    transformer = diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=32,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(2, 27, 4, 1, 2, 2),
        "timestep": torch.full((2,), 250.0),
        "encoder_hidden_states": torch.randn(2, 4, 32),
        "encoder_hidden_states_mask": (torch.arange(4) < torch.tensor([[4], [3]])).float(),
        "shape_list": [[(1, 4, 6), (1, 1, 3)], [(1, 4, 6), (1, 1, 1)]],
    }


def bria_fibo2(lengths: tuple[int, ...] = (7, 4)) -> Built:
    """Bria Fibo 2: prompts of these lengths are made into as many tokens, padded at the end."""
    torch.manual_seed(0)
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=7,
        gist_step=1,
        gist_min_text_len=4,
        gist_max_text_len=7,
        axes_dims=(4, 6, 6),
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.full((2,), 0.25),
        "encoder_hidden_states": torch.randn(2, 2, 7, 32),
        "encoder_attention_mask": torch.arange(7) < torch.tensor(lengths)[:, None],
    }


def lumina_next() -> Built:
    """Lumina-Next: text by cross-attention, two queries to a key."""
    torch.manual_seed(0)
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    ).eval()
    for name, parameter in transformer.named_parameters():
        if name.endswith("norm1.linear.weight"):  # the host starts gates at zero
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(transformer.pad_token)
    return transformer, {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.full((2,), 0.75),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_mask": TWO_TEXTS,
        "cross_attention_kwargs": {},
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 8, 12),
    }


BUILDERS = {
    "longcat": longcat,
    "ovis": ovis,
    "bria": bria,
    "bria_fibo": bria_fibo,
    "krea2": krea2,
    "auraflow": auraflow,
    "cogview3": cogview3,
    "glm": glm,
    "ernie": ernie,
    "flux3": flux3,
    "dit": dit,
    "hunyuan_dit": hunyuan_dit,
    "prx": prx,
    "nucleus": nucleus,
    "ideogram": ideogram,
    "joyimage_plus": joyimage_plus,
    "bria_fibo2": bria_fibo2,
    "lumina_next": lumina_next,
}
