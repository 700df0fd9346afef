"""The tokenizer: byte-level BPE with up to three digits a token, learned from texts of `text.py`."""

from __future__ import annotations

from functools import cache
from itertools import islice
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demos.tiny_dlm.questions import fact, pass_key, pass_key_of
from demos.tiny_dlm.text import NAMES, found_village, passages

PAD, END, MASK = "<|pad|>", "<|end|>", "<|mask|>"
VOCABULARY = 2048
_WORDS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer every time; it has a token for every byte, so it reads any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")  # a word is one token at the start too
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def number_of(token: str) -> int:
    """The number of a token such as `MASK`."""
    return build_tokenizer().get_vocab()[token]


def _texts() -> list[str]:
    random, texts = Random(0), [str(number) for number in range(1000)] * 20
    for _ in range(40):
        village = found_village(len(NAMES), random)
        texts += islice(passages(village, random), 60)
        for name in NAMES:
            for question in (pass_key(random), pass_key_of(name, random), fact(village, random)):
                texts.append(f"{question.hidden} {question.prompt} {question.answer}")
    return texts
