"""Run by an installed wheel's Python, away from the checkout: is everything there, and no more?"""

import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import sparse_dit
from sparse_dit.plan import built_in
from sparse_dit.resources import shipped

package = Path(sparse_dit.__file__).parent
assert package.parent.name == "site-packages" and package.is_relative_to(sys.prefix), package

for name, file in (("profiles", "README.md"), ("tiny_wan", "model_index.json")):
    folder = shipped(name)
    assert folder.is_relative_to(package) and (folder / file).is_file(), folder
assert (shipped("tiny_wan") / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
assert "tiny-wan" in built_in(), built_in()
for file in ("py.typed", "eval/templates/report.html.j2"):
    assert (package / file).is_file(), file

files = distribution("sparse_dit").files or []
top = {f.parts[0] for f in files} - {".."}  # `..` leads to bin/sparse-dit
assert {t for t in top if not t.endswith(".dist-info")} == {"sparse_dit"}, top
for name in ("search", "tests", "demos", "profiles", "benchmarks", "setup"):
    assert find_spec(name) is None, f"{name} became importable"
assert any(f.name == "LICENSE" for f in files)
print(f"sparse_dit {sparse_dit.__version__}: {len(files)} files, {built_in()} built in")
