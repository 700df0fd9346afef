"""The script that runs diffusers' own tests, on a checkout that is made up here."""

import json
import re

import pytest

from tests.helpers import diffusers_suites
from tests.helpers.diffusers_suites import Run, main, run_file, suite_files

SUITE = """
import copy

import torch
from diffusers import WanTransformer3DModel
from transformers import AutoConfig, AutoTokenizer


def build():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()


@torch.no_grad()
def test_copies_and_saved_models_agree(tmp_path):
    model = build()
    video, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 16)
    model.save_pretrained(tmp_path)
    models = [model, copy.deepcopy(model), WanTransformer3DModel.from_pretrained(tmp_path)]
    first, *others = [m(video, torch.tensor([500]), text).sample for m in models]
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)


def test_the_processor_is_stock():
    assert type(build().blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_that_needs_a_download():
    AutoConfig.from_pretrained("no-such/model")


def test_with_a_stand_in():
    config = AutoConfig.from_pretrained("hf-internal-testing/tiny-random-t5")
    assert len(AutoTokenizer.from_pretrained("hf-internal-testing/tiny-random-t5")) < config.vocab_size
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "tests" / "models" / "transformers"
    folder.mkdir(parents=True)
    (folder / "test_wan.py").write_text(SUITE)
    (folder / "test_sana.py").write_text("SanaTransformer2DModel")
    (folder / "helper.py").write_text("WanTransformer3DModel")
    return tmp_path


def test_what_only_passes_without_the_patch_is_told(checkout, capsys):
    file = checkout / "results.json"
    assert main([str(checkout), "--stand-ins", "--json", str(file)]) == 1
    said = capsys.readouterr().out
    assert "::test_the_processor_is_stock: passed without, failed with" in said
    (result,) = json.loads(file.read_text())
    assert result["file"] == "tests/models/transformers/test_wan.py"
    assert result["without"] == {"passed": 3, "failed": 1}
    assert result["patched"] == {"passed": 2, "failed": 2}
    ((failed, why),) = result["failures"].items()
    assert failed.endswith("::test_that_needs_a_download") and "couldn't connect to" in why
    assert "and said the same: 1 needs a download" in said
    assert [d["test"].split("::")[1] for d in result["differences"]] == [
        "test_the_processor_is_stock"
    ]
    # built twice by tests and once by from_pretrained; the copy's call isn't counted
    assert result["models"] == 3
    assert result["calls"] == {"every head dense in the plan": 2}


def _fake(monkeypatch, **differing):
    """Runs that differ as told: `test=((outcome, message) without, (outcome, message) with)`."""

    def run(settings, file, dense):
        tests = {f"file.py::{name}": both[dense] for name, both in differing.items()}
        return {"tests": tests, "patched": 1, "calls": {}}

    monkeypatch.setattr(diffusers_suites, "_pytest", run)


def test_an_exception_is_counted_and_does_not_fail_the_run(checkout, capsys, monkeypatch):
    passed, failed = ("passed", ""), ("failed", "")
    _fake(monkeypatch, test_a=(passed, failed), test_b=(passed, passed))
    monkeypatch.setattr(diffusers_suites, "EXCEPTIONS", {"::test_a$": "it asks for the class"})
    assert main([str(checkout)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "test_a: passed without, failed with it asks for the class" in said
    assert re.search(r"1 files .? 2 .? 1 .? 0 .? 1 .? 0 ", said)  # passed twice, differ, excepted


def test_a_test_that_runs_but_once_differs(checkout, monkeypatch):
    def run(settings, file, dense):
        tests = {} if dense else {"file.py::test_a": ("passed", "")}
        return {"tests": tests, "patched": 0, "calls": {}}

    monkeypatch.setattr(diffusers_suites, "_pytest", run)
    (difference,) = run_file(Run(checkout), suite_files(checkout, [])[0]).unexplained
    assert (difference.without, difference.patched) == ("passed", "not run")


def test_what_fails_both_times_must_say_the_same(checkout, monkeypatch):
    said, elsewhere = ("failed", "got 0.5 at 0x7f01"), ("failed", "got 0.5 at 0x7f02")
    _fake(monkeypatch, test_a=(said, elsewhere), test_b=(said, ("failed", "got 0.6 at 0x7f01")))
    result = run_file(Run(checkout), suite_files(checkout, [])[0])
    assert [d.test for d in result.unexplained] == ["file.py::test_b"]
    assert result.failures == {"file.py::test_a": "got 0.5 at 0x7f01"}


def test_a_run_that_takes_too_long_is_told(checkout):
    (file,) = suite_files(checkout, [])
    result = run_file(Run(checkout, timeout=0.01), file)
    assert result.without == result.patched == {"error": 1}
    assert "took longer than 0.01 s" in result.failures["test_wan.py"]


def test_files_are_those_of_supported_models(checkout):
    assert [path.name for path in suite_files(checkout, [])] == ["test_wan.py"]
    assert suite_files(checkout, ["flux"]) == []


def test_a_folder_that_is_no_checkout_is_told(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no test file of a supported model" in capsys.readouterr().err
