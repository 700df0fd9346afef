"""Classes of transformers that the tests run with the patch on, with tiny random weights.

Any other whose attention goes through `AttentionInterface` is taken too.
"""

LANGUAGE_MODELS = (
    *("BertForMaskedLM", "CohereForCausalLM", "DeepseekV3ForCausalLM", "EuroBertForMaskedLM"),
    *("GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("GemmaForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "MixtralForCausalLM", "ModernBertForMaskedLM", "Olmo2ForCausalLM"),
    *("Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "RobertaForMaskedLM"),
    *("SmolLM3ForCausalLM", "Starcoder2ForCausalLM"),
)
VLMS = tuple(
    f"{name}ForConditionalGeneration"
    for name in (
        *("Gemma3", "Gemma4", "Glm4v", "InternVL", "LlavaNextVideo", "LlavaOnevision", "Mistral3"),
        *("PaliGemma", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "SmolVLM"),
    )
)
