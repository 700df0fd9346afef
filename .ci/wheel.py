"""Run by an installed wheel's Python, away from the checkout: is everything there, and no more?"""

import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import torch

import sparse_dit
from sparse_dit import TokenLayout, sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.index import build_index
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import built_in
from sparse_dit.resources import shipped

package = Path(sparse_dit.__file__).parent
assert package.parent.name == "site-packages" and package.is_relative_to(sys.prefix), package

for name, file in (("profiles", "README.md"), ("tiny_wan", "model_index.json")):
    folder = shipped(name)
    assert folder.is_relative_to(package) and (folder / file).is_file(), folder
assert (shipped("tiny_wan") / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
assert "tiny-wan" in built_in(), built_in()
for file in (
    "py.typed",
    "eval/templates/report.html.j2",
    "serve/templates/page.html.j2",
    "serve/static/page.js",
):
    assert (package / file).is_file(), file

assert library.LIBRARY is not None, library.PROBLEM
assert library.FILE.is_relative_to(package), library.FILE
layout = TokenLayout.video(4, 8, 8)
index = build_index([Pattern(Window(0, 1, 1), (1, 4, 4)), Pattern(Dense())], layout)
q, k, v = (torch.randn(1, 2, layout.seq_len, 64) for _ in range(3))
out = sparse_attention(q, k, v, index, backend="cpu")
# in float64: torch's own float32 is now and then 4e-5 off in the first call of a process
exact = sparse_attention(q.double(), k.double(), v.double(), index, backend="reference")
torch.testing.assert_close(out.double(), exact, rtol=1.3e-6, atol=1e-5)

files = distribution("sparse_dit").files or []
top = {f.parts[0] for f in files} - {".."}  # `..` leads to bin/sparse-dit
assert {t for t in top if not t.endswith(".dist-info")} == {"sparse_dit"}, top
for name in ("search", "tests", "demos", "profiles", "benchmarks", "setup"):
    assert find_spec(name) is None, f"{name} became importable"
assert any(f.name == "LICENSE" for f in files)
assert not any(f.suffix in (".cpp", ".h", ".inc") for f in files), (
    "the kernel's sources are in the wheel"
)
print(f"sparse_dit {sparse_dit.__version__}: {len(files)} files, {built_in()} built in")
print(f"CPU kernel: {library.LIBRARY.running}, of {', '.join(library.LIBRARY.variants)}")
