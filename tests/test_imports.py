import re
import subprocess
import sys
from pathlib import Path

import sparse_dit

HEAVY = (
    "accelerate",
    "diffusers",
    "gradio",
    "imageio",
    "jinja2",
    "matplotlib",
    "rich",
    "scipy",
    "skimage",
    "tqdm",
    "transformers",
    "triton",
    "typer",
)


def _loaded(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_torch_and_no_host_library():
    # whatever torch itself loads is not ours to avoid
    allowed = _loaded("import torch, pydantic, safetensors")
    assert set(HEAVY) & (_loaded("import sparse_dit") - allowed) == set()


def test_the_runtime_does_not_load_the_search():
    names = "import sparse_dit.patch, sparse_dit.integrations.diffusers; names = [*sys.modules]"
    code = f"{names}; assert not [n for n in names if n.startswith('sparse_dit.search')]"
    assert "sparse_dit" in _loaded(code)


def test_the_benchmark_stands_apart():
    package = Path(sparse_dit.__file__).parent
    knows = re.compile(r"^\s*(from|import) .*\bbench\b", re.MULTILINE)
    files = [f for f in package.rglob("*.py") if f.parent.name != "bench"]
    assert [f.name for f in files if knows.search(f.read_text())] == ["cli.py"]
    allowed = {"attention", "backends", "bench", "index", "layout", "patterns", "rounding"}
    allowed.add("whole_file")
    for file in package.glob("bench/*.py"):
        # the command line's own (tables, provenance), what measures for the search, by its own clock, and
        # what measures the patch itself
        if file.name in ("command.py", "cost.py", "seam.py"):
            continue
        for dots, name in re.findall(r"^\s*from (\.+)(\w*)", file.read_text(), re.MULTILINE):
            assert dots == "." or name in allowed, f"{file.name} imports {name}"
