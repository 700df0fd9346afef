"""The Python of the README and the other documents: it runs, smaller, and every name in it exists."""

import ast
import contextlib
import importlib
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import sparse_dit
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.layout import TokenLayout
from sparse_dit.patch import Handle
from tests.helpers.documents import ROOT, pages, prose, snippets
from tests.helpers.eval_cases import WINDOW, uniform_plan
from tests.helpers.search_cases import stub_costs
from tests.helpers.tiny_canvases import bytes_writer
from tests.helpers.tiny_language_models import save_language_model, vision
from tests.helpers.tiny_pipelines import wan

# what is written instead, so that it takes a second
SMALLER = {
    r'pipe\("a cat playing piano"\)': 'pipe("a cat playing piano", **SMALL)',
    r"GenerationSettings\(480, 832, 81, steps=50, guidance=5.0\)": (
        "GenerationSettings(64, 64, 17, steps=2, guidance=1.0)"
    ),
    r"min_psnr=30": "min_psnr=5",
    r"height=\d+, width=\d+, num_frames=15": "height=32, width=32, num_frames=5",
    r"height=480, width=832, num_frames=81": "height=64, width=64, num_frames=17",
    r"num_inference_steps=\d+": "num_inference_steps=1",
    r'"demos/tiny_wan/model"': repr(str(ROOT / "demos" / "tiny_wan" / "model")),
    r'"demos/tiny_wan"': repr(str(ROOT / "demos" / "tiny_wan")),
    r'"demos/tiny_vlm/model"': repr(str(ROOT / "demos" / "tiny_vlm" / "model")),
    r'"demos/tiny_dlm/model"': repr(str(ROOT / "demos" / "tiny_dlm" / "model")),
    r"video\(21, 30, 52": "video(3, 8, 8",
    r'"HuggingFaceTB/SmolLM2-135M-Instruct"': '"language-model"',
    r"max_kl=0\.03": "max_kl=0.03, rows=4, passkey_depths=()",
}
# not run, but its names are looked up
ELSEWHERE = (
    "enable_parallelism",  # tests/integrations/test_parallel.py runs that in several processes
    "http://127.0.0.1:8000",  # tests/serve/test_text.py runs that beside a server
)
EVERY = [shown for page in pages() for shown in snippets(page)]


class MyTransformer3DModel(diffusers.WanTransformer3DModel):
    """A class that isn't known until it is added; its tokens lie as Wan's do."""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A tiny pipeline, and a plan for it."""
    pipe, call = wan()
    folder = tmp_path_factory.mktemp("python")
    uniform_plan(pipe, WINDOW, TokenLayout.video(5, 4, 4)).save(folder / "plan.json")
    del call["prompt"], call["output_type"]
    return pipe, call, folder / "plan.json"


@pytest.fixture
def unknown_model():
    """A pipeline whose transformer's class may be added once."""
    pipe, _ = wan()
    pipe.transformer.__class__ = MyTransformer3DModel
    yield pipe
    FAMILIES.pop("MyTransformer3DModel", None)


@pytest.mark.parametrize("shown", EVERY, ids=[f"{s.page} {n}" for n, s in enumerate(EVERY)])
def test_python_runs_as_it_is_shown(shown, searched, unknown_model, tmp_path, monkeypatch):
    assert not unknown_names(shown.text)
    if any(words in shown.text for words in ELSEWHERE):
        return
    pipe, call, plan = searched
    text = shown.text
    for known, smaller in SMALLER.items():
        text = re.sub(known, lambda _, smaller=smaller: smaller, text)
    (tmp_path / "plan.json").write_bytes(plan.read_bytes())
    given = {}
    if shown.page == "docs/language-models.md":
        given = language(tmp_path)
    elif shown.page == "docs/vision-language.md":
        vlm, inputs = vision("qwen2_5_vl")
        others = vision("qwen2_5_vl")[1]
        given = {"vlm": vlm, "inputs": inputs, "others": others, "sparse_dit": sparse_dit}
    elif shown.page == "docs/diffusion-language-models.md":
        given = {"writer": bytes_writer()}
    stub_costs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    if "add_model" in text:
        pipe = unknown_model
        uniform_plan(pipe, WINDOW, TokenLayout.video(5, 4, 4)).save("plan.json", overwrite=True)
    if "plan.save(" in text:
        Path("plan.json").unlink()
    q, k, v = torch.randn(3, 1, 2, 192, 24)
    given |= {"pipe": pipe, "SMALL": call, "num_heads": 2, "q": q, "k": k, "v": v}
    if any("import sparse_dit" in before.text for before in EVERY[: EVERY.index(shown)]
           if before.page == shown.page):  # fmt: skip
        given["sparse_dit"] = sparse_dit
    exec(compile(text, shown.page, "exec"), {**given, "MyTransformer3DModel": MyTransformer3DModel})
    sparse_dit.unpatch(pipe)


def language(folder):
    """A language model in a folder and in memory, and texts for it."""
    folder = save_language_model(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return {"model": model, "tokenizer": words, "inputs": words("A prompt", return_tensors="pt")}


def test_python_in_sentences_names_what_exists():
    seen = 0
    for page in pages():
        for text in re.findall(r"`((?:sparse_dit|handle)\.[^`]+)`", prose(page)):
            tree = text.replace("...", "None")
            if not text.startswith("sparse_dit/") and _parses(tree):
                _import_modules(text)
                assert not unknown_names(tree), f"{page}: {text}"
                seen += 1
    assert seen > 8


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_every_shortening_is_of_something():
    everything = "\n".join(shown.text for shown in EVERY)
    assert [known for known in SMALLER if not re.search(known, everything)] == []
    assert all(words in everything for words in ELSEWHERE) and len(EVERY) > 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sparse_dit\nsparse_dit.path(pipe, plan)", "sparse_dit.path"),
        ("from sparse_dit.generation import Settings", "sparse_dit.generation.Settings"),
        ("from sparse_dit.generations import Case", "sparse_dit.generations"),
        ("sparse_dit.patch(pipe, plan, guard=True)", "patch(guard=)"),
        ("from sparse_dit import search\nsearch(pipe, [], least_psnr=30)", "search(least_psnr=)"),
        ("handle.summarise()", "handle.summarise"),
    ],
)
def test_a_wrong_name_is_found(text, words):
    assert words in unknown_names(text)


def _import_modules(text: str) -> None:
    """Import the modules that a dotted name begins with, as sentences name them without an import."""
    names = re.findall(r"\w+", text.split("(")[0])
    with contextlib.suppress(ImportError):
        for count in range(1, len(names) + 1):
            importlib.import_module(".".join(names[:count]))


def unknown_names(text: str) -> list[str]:
    """Names of `sparse_dit` and keywords of its functions, and names of a handle, that don't exist."""
    tree, wrong, known = ast.parse(text), [], {"sparse_dit": sparse_dit, "handle": Handle}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparse_dit"):
            known |= _imported(node, wrong)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _named(node.value, known) is not None:
            if _named(node, known) is None:
                wrong.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and callable(function := _named(node.func, known)):
            wrong += _keywords(ast.unparse(node.func).split(".")[-1], function, node)
    return wrong


def _imported(node: ast.ImportFrom, wrong: list[str]) -> dict[str, object]:
    """What an import binds; what it can't import is added to `wrong`."""
    try:
        module = importlib.import_module(node.module or "")
    except ImportError:
        wrong.append(node.module or "")
        return {}
    wrong += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    return {a.name: getattr(module, a.name) for a in node.names if hasattr(module, a.name)}


def _named(node: ast.AST, known: dict[str, object]) -> object | None:
    """What a name or an attribute stands for; None if that isn't known or isn't there."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _named(node.value, known)) is not None:
        found = getattr(owner, node.attr, None)
        fields = getattr(owner, "__annotations__", {})
        return found if found is not None else fields.get(node.attr)
    return None


def _keywords(name: str, function: object, call: ast.Call) -> list[str]:
    """Keywords of a call that the function doesn't take."""
    parameters = inspect.signature(function).parameters.values()  # pyright: ignore[reportArgumentType]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    takes = {p.name for p in parameters}
    return [f"{name}({word.arg}=)" for word in call.keywords if word.arg and word.arg not in takes]
