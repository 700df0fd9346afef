"""Made-up stand-ins for the tiny models that diffusers' tests would download.

Text encoders and tokenizers under the names that those tests ask the hub for, with random weights
and a vocabulary of their own, as a cache that huggingface_hub reads without a network. With them
the pipelines' tests run, except that numbers which they expect of the real files don't come out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers.tiny_pipelines import tokenizer

COMMIT = "0" * 40
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
# one message after the other, as text; lists of parts, too
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] or '' }}{% endfor %}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_stand_ins(cache: Path) -> None:
    """Write all of them into an empty folder, for the environment variable `HF_HUB_CACHE`."""
    for name, parts in STAND_INS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        torch.manual_seed(0)
        for subfolder, part in parts():
            part.save_pretrained(repository / "snapshots" / COMMIT / subfolder)


Parts = Iterator[tuple[str, Any]]  # (folder in the repository, what is saved there)


def _chat() -> Any:
    """Longer texts than CLIP's, and messages."""
    words = tokenizer()
    words.model_max_length = 4096
    words.chat_template = TEMPLATE
    return words


def _t5_words() -> Parts:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-/"
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "\u2581",
        *letters,
        "\u2581a",
        "\u2581the",
        "th",
        "er",
        "an",
    ]
    scores = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    yield "", transformers.T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def _t5(kind: str) -> Callable[[], Parts]:
    def parts() -> Parts:
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        yield from _t5_words()
        yield "", getattr(transformers, f"{kind}EncoderModel")(config)

    return parts


def _clip() -> Parts:
    yield "", tokenizer()


def _llama() -> Parts:
    config = transformers.LlamaConfig(vocab_size=1024, hidden_size=16, **SIZES, **SPECIAL)
    yield "", _chat()
    yield "", transformers.LlamaForCausalLM(config)


def _words(subfolder: str = "") -> Parts:
    yield subfolder, _chat()
    yield subfolder, transformers.LlamaConfig()  # AutoTokenizer asks for a configuration, too


def _gemma() -> Parts:
    text: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 32,
        "head_dim": 8,
        "num_key_value_heads": 4,
    }
    vision = {**SIZES, "hidden_size": 32, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**text, **SIZES, **SPECIAL}, vision_config=vision, mm_tokens_per_image=4
    )
    yield "", _chat()
    yield "", transformers.Gemma3ForConditionalGeneration(config)


def _qwen() -> Parts:
    rope: dict[str, Any] = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text: dict[str, Any] = {
        **SIZES,
        "vocab_size": 1024,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "rope_scaling": rope, "bos_token_id": 3, "eos_token_id": 1},
        vision_config=vision,
    )
    yield "", _chat()
    yield "", transformers.Qwen2VLForConditionalGeneration(config)


# by the name on the hub
STAND_INS: dict[str, Callable[[], Parts]] = {
    "hf-internal-testing/tiny-random-t5": _t5("T5"),
    "hf-internal-testing/tiny-random-umt5": _t5("UMT5"),
    "hf-internal-testing/tiny-random-clip": _clip,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "finetrainers/dummy-hunyaunvideo": functools.partial(_words, "tokenizer"),
    "hf-internal-testing/dummy-gemma": _words,
    "THUDM/glm-4-9b-chat": _words,
    "hf-internal-testing/tiny-gemma3": _gemma,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": _qwen,
}
