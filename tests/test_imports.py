import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import sparse_dit

HEAVY = (
    "accelerate",
    "diffusers",
    "fastapi",
    "gradio",
    "imageio",
    "jinja2",
    "matplotlib",
    "ray",
    "rich",
    "scipy",
    "skimage",
    "sqlalchemy",
    "tqdm",
    "transformers",
    "triton",
    "typer",
    "uvicorn",
)

# what each part of the package must know nothing of, so that arrows point one way
ABOVE = {
    **dict.fromkeys(
        ("patterns", "backends", "plan"),
        ("integrations", "hosts", "search", "eval", "bench", "demo", "serve"),
    ),
    "integrations": ("hosts", "search", "auto", "eval", "bench", "demo", "serve", "cli"),
    "hosts": ("search", "auto", "eval", "bench", "demo", "serve", "cli"),
    "search": ("hosts", "auto", "eval", "bench", "demo", "serve", "cli"),
    "auto": ("hosts", "eval", "bench", "demo", "serve", "cli"),
    "eval": ("hosts", "demo", "serve", "cli"),
    "bench": ("demo", "serve", "cli"),
    "demo": ("serve", "cli"),
    "serve": ("cli",),
}


def _known(file: Path, names: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports when it is imported, or for its types."""
    package = Path(sparse_dit.__file__).parent.parent
    parts = file.relative_to(package).with_suffix("").parts
    found = set()
    body = ast.parse(file.read_text()).body
    guarded = [n for n in body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    for node in [*body, *(inner for guard in guarded for inner in guard.body)]:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            name = ".".join(part for part in base if part)
            inside = {f"{name}.{alias.name}" for alias in node.names}
            found |= inside & names.keys() or {name} & names.keys()
    return found


def _modules() -> dict[str, Path]:
    package = Path(sparse_dit.__file__).parent
    files = package.rglob("*.py")
    return {
        ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): file
        for file in files
    }


def test_imports_make_no_circle():
    names = _modules()
    graph = {name: _known(file, names) - {name} for name, file in names.items()}
    assert sum(map(len, graph.values())) > len(graph), "imports are seen"
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle


def test_arrows_point_one_way():
    names = _modules()
    for name, file in names.items():
        part = name.split(".")[1] if "." in name else ""
        for other in _known(file, names):
            above = other.split(".")[1] if "." in other else ""
            assert above not in ABOVE.get(part, ()), f"{name} imports {other}"


# names by which diffusers' pipelines and layers are known
OF_DIFFUSERS = {
    *("boundary_ratio", "cache_context", "callback_on_step_end", "check_inputs", "guidance_embeds"),
    *("num_train_timesteps", "scheduler", "set_processor", "to_out", "transformer_2", "vae"),
}
# which transformers are known, and what the seam of this one host costs
OF_ONE_HOST = {
    "models.py": ("integrations.families", "integrations.language.tested"),
    "bench/seam.py": ("integrations.idle",),
}


def test_a_file_has_one_subject_and_fits_on_a_few_screens():
    long = {name: len(file.read_text().splitlines()) for name, file in _modules().items()}
    assert not {name: lines for name, lines in long.items() if lines > 350}


def test_only_hosts_know_their_libraries():
    package = Path(sparse_dit.__file__).parent
    for file in package.rglob("*.py"):
        name = file.relative_to(package).as_posix()
        if name.startswith("integrations/"):
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in OF_DIFFUSERS, f"{name} reads .{node.attr}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in OF_DIFFUSERS, f"{name} names {node.value}"
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            for other in found:
                assert other.partition(".")[0] not in ("accelerate", "diffusers", "transformers")
                inner = other.startswith("integrations.")
                assert not inner or other.startswith(OF_ONE_HOST.get(name, ())), (
                    f"{name} imports {other}: ask the host"
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
    # the command line, and the report, which says what the patch itself costs
    known = {str(f.relative_to(package)) for f in files if knows.search(f.read_text())}
    assert known == {"cli/__init__.py", "cli/bench.py", "eval/command.py"}
    allowed = {"attention", "backends", "bench", "entry", "index", "layout", "patterns", "rounding"}
    allowed |= {"timing", "whole_file"}
    for file in package.glob("bench/*.py"):
        # what measures for the search, by its own clock, and what measures the patch itself
        if file.name in ("cost.py", "seam.py"):
            continue
        for dots, name in re.findall(r"^\s*from (\.+)(\w*)", file.read_text(), re.MULTILINE):
            assert dots == "." or name in allowed, f"{file.name} imports {name}"
