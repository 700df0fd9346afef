"""benchmarks/gpu.py in its dry mode, where no GPU is, and the model that it fits."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import token_order
from benchmarks.tile_model import TileModel, fit
from sparse_dit.attention import BACKENDS
from sparse_dit.backends.attended import Attended
from sparse_dit.resources import shipped

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
INTERPRETED = """
import os, runpy
os.environ["TRITON_INTERPRET"] = "1"
from tests.gpu_without_gpu import triton_nested
triton_nested.install()
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
SMALL = ["--dry", "--tokens", "128", "192", "--head-dim", "16", "--pattern", "blocks", "--backend"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_dry_run_checks_times_writes_and_fits(tmp_path):
    """As a user runs it, Triton's kernels interpreted, which is made faster."""
    pytest.importorskip("triton")
    file, picture = tmp_path / "gpu.json", tmp_path / "gpu.png"
    command = [
        sys.executable,
        "-c",
        INTERPRETED,
        "--dry",
        "--tokens",
        "256",
        "320",
        "--json",
        str(file),
    ]
    root = str(SCRIPT.parents[1])
    done = subprocess.run(
        [*command, "--plot", str(picture), "--backend", "triton", "gather"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(file.read_text())
    assert data["dry"] and "say nothing of a GPU" in done.stdout
    assert {v["backend"]: v["problem"] for v in data["verdicts"]} == {
        "triton": None,
        "gather": None,
    }
    rows = {(r["backend"], r["pattern"], r["tokens"]) for r in data["rows"]}
    assert rows == {
        (name, pattern, tokens)
        for name in ("triton", "gather") for pattern in ("dense", "blocks", "far")
        for tokens in (256, 320)
    } | {("sdpa", "dense", 256), ("sdpa", "dense", 320)}  # fmt: skip
    for row in data["rows"]:
        assert row["dense_kernel"] == "sdpa" and row["error"] < 2e-5
        assert row["speedup"] == pytest.approx(row["sdpa_seconds"] / row["seconds"])
        assert (row["forecast_seconds"] is None) == (row["pattern"] == "dense")
    assert {model["backend"] for model in data["models"]} == {"triton", "gather"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so(script, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert script.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_backend_that_computes_dense_is_not_timed(script, capsys, monkeypatch):
    def dense(q, k, v, index, rows, scale, return_lse, mass_block):
        return Attended(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True))

    monkeypatch.setattr(BACKENDS["gather"], "forward", dense)
    assert script.main([*SMALL, "gather"]) == 1
    said = capsys.readouterr().out
    assert "gather, head_dim 16, float32: FAILED" in said and "\ngather   " not in said


def test_what_a_backend_refuses_is_no_failure(script, capsys):
    assert script.main([*SMALL, "gather", "cudnn"]) == 0
    said = capsys.readouterr().out
    assert "cudnn, head_dim 16, float32: not here" in said and "\ngather   " in said


def test_fit_finds_the_constants_again():
    true = TileModel(2e-5, 3e-6, 1e-6, 132, 128, 64)
    calls = [(n, h, true.uniform(n, h)) for n in (4096, 8192, 20000, 33000) for h in (1, 8)]
    found = fit(calls, 132, 128, 64)
    assert found.launch == pytest.approx(2e-5, rel=1e-6)
    assert found.tile == pytest.approx(3e-6, rel=1e-6)
    assert found.step == pytest.approx(1e-6, rel=1e-6)
    assert found.uniform(8192, 8, 0.25) == pytest.approx(true.uniform(8192, 8, 0.25))


def test_constants_are_never_below_zero():
    found = fit([(1024, 1, 1e-3), (2048, 1, 9e-3), (4096, 1, 4e-2)], 4, 128, 64)
    assert min(found.launch, found.tile) >= 0 and found.step > 0
    alone = fit([(1024, 2, 1e-3)], 4, 128, 64)
    assert alone.uniform(1024, 2) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="got none"):
        fit([], 4, 128, 64)


def test_tiles_take_the_slot_that_is_free_first():
    model = TileModel(1.0, 0.5, 1.0, 2, 128, 64)
    assert model.seconds([4, 1, 1, 1]) == pytest.approx(1 + 4.5)
    assert model.seconds([1, 1, 1, 4]) == pytest.approx(1 + 1.5 + 4.5)
    steps = [2048 / 64 * 0.25] * math.ceil(2048 / 128) * 3
    assert model.seconds(steps) == pytest.approx(model.uniform(2048, 3, 0.25))
    assert model.seconds([]) == 1.0


def test_forwards_in_both_token_orders_in_the_small(capsys):
    model = str(shipped("tiny_wan"))
    assert (
        token_order.main(["--model", model, "--size", "48", "--steps", "2", "--rounds", "1"]) == 0
    )
    told = capsys.readouterr().out
    assert "tokens sorted once a forward (8x), by tiles of allx1x8" in told
    assert "4 pairs: " in told
    model, plan = re.findall(r"density (0\.\d+)", told)
    assert model == plan
    assert float(re.search(r"difference of an output: (.+)", told)[1]) < 1e-5
