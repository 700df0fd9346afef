"""Tiny random language models and VLMs of transformers, one a family, with inputs for a forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from torch import Tensor

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ENCODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 128, "pad_token_id": 0,
}  # fmt: skip
LAYERS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE, VIDEO, START, END = 110, 111, 112, 113
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO,
    "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip

Made = tuple[Any, dict[str, Any]]


def tokens(*parts: tuple[int | None, int]) -> Tensor:
    """Token ids `[1, N]` of `(token, count)` pairs; None is text at random."""
    ids: list[int] = []
    for token, count in parts:
        ids += torch.randint(5, 100, (count,)).tolist() if token is None else [token] * count
    return torch.tensor([ids])


def text(name: str, batch: int = 2, length: int = 40) -> Made:
    """A text model of a family, and the ids of sequences without padding."""
    torch.manual_seed(0)
    kind, config = TEXT_MODELS[name]
    model = kind(config()).eval()
    return model, {"input_ids": torch.randint(5, 100, (batch, length))}


def vision(name: str) -> Made:
    """A VLM of a family, and a prompt with an image or a video in it."""
    torch.manual_seed(0)
    return VISION_MODELS[name]()


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What a model says of every token."""
    with torch.no_grad():
        return model(**inputs).logits


def _deepseek() -> Any:
    return T.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1,
    )  # fmt: skip


TEXT_MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llama": (T.LlamaForCausalLM, lambda: T.LlamaConfig(**TEXT)),
    "llama with biases": (T.LlamaForCausalLM, lambda: T.LlamaConfig(**TEXT, attention_bias=True)),
    "llama both ways": (T.LlamaForCausalLM, lambda: T.LlamaConfig(**TEXT, is_causal=False)),
    "mistral": (T.MistralForCausalLM, lambda: T.MistralConfig(**TEXT, sliding_window=16)),
    "mixtral": (T.MixtralForCausalLM, lambda: T.MixtralConfig(**TEXT, **EXPERTS)),
    "qwen2": (
        T.Qwen2ForCausalLM,
        lambda: T.Qwen2Config(**TEXT, **LAYERS, use_sliding_window=True),
    ),
    "qwen3": (T.Qwen3ForCausalLM, lambda: T.Qwen3Config(**TEXT, head_dim=16)),
    "gemma": (T.GemmaForCausalLM, lambda: T.GemmaConfig(**TEXT, head_dim=16)),
    "gemma2": (T.Gemma2ForCausalLM, lambda: T.Gemma2Config(**TEXT, head_dim=16, sliding_window=16)),
    "gemma3": (T.Gemma3ForCausalLM, lambda: T.Gemma3TextConfig(**TEXT, **LAYERS, head_dim=16)),
    "gpt_oss": (
        T.GptOssForCausalLM,
        lambda: T.GptOssConfig(**TEXT, **LAYERS, **EXPERTS, head_dim=16),
    ),
    "phi3": (T.Phi3ForCausalLM, lambda: T.Phi3Config(**TEXT)),
    "olmo2": (T.Olmo2ForCausalLM, lambda: T.Olmo2Config(**TEXT)),
    "cohere": (T.CohereForCausalLM, lambda: T.CohereConfig(**TEXT)),
    "granite": (T.GraniteForCausalLM, lambda: T.GraniteConfig(**TEXT, attention_multiplier=0.2)),
    "starcoder2": (T.Starcoder2ForCausalLM, lambda: T.Starcoder2Config(**TEXT)),
    "smollm3": (T.SmolLM3ForCausalLM, lambda: T.SmolLM3Config(**TEXT)),
    "deepseek_v3": (T.DeepseekV3ForCausalLM, _deepseek),
    "gpt2": (
        T.GPT2LMHeadModel,
        lambda: T.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=512),
    ),
    "gpt_neox": (T.GPTNeoXForCausalLM, lambda: T.GPTNeoXConfig(**ENCODER)),
    "bert": (T.BertForMaskedLM, lambda: T.BertConfig(**ENCODER)),
    "roberta": (T.RobertaForMaskedLM, lambda: T.RobertaConfig(**ENCODER)),
    "modernbert": (
        T.ModernBertForMaskedLM,
        lambda: T.ModernBertConfig(**{**ENCODER, "num_hidden_layers": 3}, local_attention=16),
    ),
    "eurobert": (T.EuroBertForMaskedLM, lambda: T.EuroBertConfig(**TEXT)),
}


def _qwen_text() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return {**TEXT, "rope_parameters": rope}


def _qwen_video(ids: Tensor, frames: int = 3, height: int = 4, width: int = 6) -> dict[str, Any]:
    pixels = torch.randn(frames * height * width, 3 * 2 * 4 * 4)
    grid = torch.tensor([[frames, height, width]])
    return {
        "input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": grid,
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
    }  # fmt: skip


def _qwen2_vl() -> Made:
    sight = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
    }
    config = T.Qwen2VLConfig(text_config=_qwen_text(), vision_config=sight, **TOKENS)
    ids = tokens((None, 5), (START, 1), (VIDEO, 18), (END, 1), (None, 7))
    return T.Qwen2VLForConditionalGeneration(config).eval(), _qwen_video(ids)


def _qwen2_5_vl() -> Made:
    sight = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = T.Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=sight, **TOKENS)
    ids = tokens((None, 5), (START, 1), (VIDEO, 18), (END, 1), (None, 7))
    return T.Qwen2_5_VLForConditionalGeneration(config).eval(), _qwen_video(ids)


def _qwen3_vl() -> Made:
    sight = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    written = {**_qwen_text(), "head_dim": 16}
    config = T.Qwen3VLConfig(text_config=written, vision_config=sight, **TOKENS)
    frame = [(None, 3), (START, 1), (VIDEO, 6), (END, 1)]
    ids = tokens((None, 5), *frame, *frame, *frame, (None, 7))
    return T.Qwen3VLForConditionalGeneration(config).eval(), _qwen_video(ids)


def _glm4v() -> Made:
    rope = {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }  # fmt: skip
    sight = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 64, "image_size": 32,
    }  # fmt: skip
    config = T.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=sight, image_token_id=IMAGE,
        video_token_id=VIDEO, image_start_token_id=108, image_end_token_id=109,
        video_start_token_id=START, video_end_token_id=END,
    )  # fmt: skip
    frame = [(108, 1), (IMAGE, 6), (109, 1), (None, 2)]
    ids = tokens((None, 5), (START, 1), *frame, *frame, *frame, (END, 1), (None, 7))
    inputs = _qwen_video(ids)
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() * 2
    return T.Glm4vForConditionalGeneration(config).eval(), inputs


def _siglip() -> Any:
    return T.SiglipVisionConfig(**VISION, image_size=32, patch_size=8)


def _llava_onevision() -> Made:
    config = T.LlavaOnevisionConfig(
        vision_config=_siglip(), text_config=T.Qwen2Config(**TEXT), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=[[32, 32]],
    )  # fmt: skip
    ids = tokens((None, 4), (VIDEO, 3 * 4 + 1), (None, 6))
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 3, 3, 32, 32)}
    return T.LlavaOnevisionForConditionalGeneration(config).eval(), inputs


def _llava_next_video() -> Made:
    config = T.LlavaNextVideoConfig(
        vision_config=T.CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=T.LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
    )  # fmt: skip
    ids = tokens((None, 4), (VIDEO, 3 * 4), (None, 6))
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 3, 3, 32, 32)}
    return T.LlavaNextVideoForConditionalGeneration(config).eval(), inputs


def _two_images() -> Tensor:
    return tokens((None, 3), (IMAGE, 4), (None, 3), (IMAGE, 4), (None, 6))


def _internvl() -> Made:
    sight = T.InternVLVisionConfig(**VISION, image_size=[32, 32], patch_size=[8, 8])
    config = T.InternVLConfig(
        vision_config=sight, text_config=T.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
    )  # fmt: skip
    inputs = {"input_ids": _two_images(), "pixel_values": torch.randn(2, 3, 32, 32)}
    return T.InternVLForConditionalGeneration(config).eval(), inputs


def _smolvlm() -> Made:
    config = T.SmolVLMConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE,
    )  # fmt: skip
    inputs = {"input_ids": _two_images(), "pixel_values": torch.randn(1, 2, 3, 32, 32)}
    return T.SmolVLMForConditionalGeneration(config).eval(), inputs


def _gemma3() -> Made:
    config = T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**TEXT, **LAYERS, head_dim=16), vision_config=_siglip(),
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    ids = tokens((None, 3), (START, 1), (IMAGE, 4), (END, 1), (None, 20))
    kinds = (ids == IMAGE).long()
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32), "token_type_ids": kinds}
    return T.Gemma3ForConditionalGeneration(config).eval(), inputs


def _gemma4() -> Made:
    sight = {
        **VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "patch_size": 4,
        "position_embedding_size": 64,
    }  # fmt: skip
    written = T.Gemma4TextConfig(
        **TEXT, **LAYERS, head_dim=16, hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
    )  # fmt: skip
    config = T.Gemma4Config(
        text_config=written, vision_config=sight, audio_config=None, image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip
    ids = tokens((None, 3), (IMAGE, 4), (None, 20))
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    inputs = {
        "input_ids": ids, "pixel_values": torch.rand(1, 16, 48),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "image_position_ids": torch.stack([x, y], -1).view(1, 16, 2),
    }  # fmt: skip
    return T.Gemma4ForConditionalGeneration(config).eval(), inputs


def _mistral3() -> Made:
    config = T.Mistral3Config(
        vision_config=T.PixtralVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=T.MistralConfig(**TEXT, sliding_window=None), image_token_index=IMAGE,
    )  # fmt: skip
    inputs = {
        "input_ids": tokens((None, 3), (IMAGE, 4), (None, 6)),
        "pixel_values": torch.randn(1, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]]),
    }  # fmt: skip
    return T.Mistral3ForConditionalGeneration(config).eval(), inputs


def _paligemma() -> Made:
    config = T.PaliGemmaConfig(
        text_config=T.GemmaConfig(**TEXT, head_dim=16), vision_config=_siglip(),
        image_token_index=IMAGE, projection_dim=64,
    )  # fmt: skip
    inputs = {
        "input_ids": tokens((IMAGE, 16), (None, 6)), "pixel_values": torch.randn(1, 3, 32, 32),
        "token_type_ids": torch.zeros(1, 22, dtype=torch.long),
    }  # fmt: skip
    return T.PaliGemmaForConditionalGeneration(config).eval(), inputs


VISION_MODELS: dict[str, Callable[[], Made]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "glm4v": _glm4v,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
}


def tokenizer() -> Any:
    """A tokenizer whose tokens are the ASCII characters, for vocabularies of 128."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({chr(n): n for n in range(128)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return T.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def save_language_model(folder: Path) -> Path:
    """A llama with its tokenizer in `folder / "language-model"`, and two texts beside it."""
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**TEXT))
    model.save_pretrained(folder / "language-model")
    tokenizer().save_pretrained(folder / "language-model")
    drawn = torch.randint(32, 127, (2, 400), generator=torch.Generator().manual_seed(1)).tolist()
    for name, codes in zip(("book.txt", "other.txt"), drawn, strict=True):
        (folder / name).write_text("".join(map(chr, codes)))
    return folder / "language-model"
