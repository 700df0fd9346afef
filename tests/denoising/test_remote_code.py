"""A bidirectional model whose class lies in its folder, through the same seam as transformers' own."""

import json
import shutil

import pytest
import torch
import transformers as T

import sparse_dit
from sparse_dit.integrations import attach, components
from tests.helpers import remote_model
from tests.helpers.tiny_canvases import MASK, llada2, prompt, written


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads such a model anew, by what its attention calls and is loaded as."""
    monkeypatch.setattr(T.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def made(calls="interface", implementation="sdpa"):
        folder = tmp_path / calls
        torch.manual_seed(0)
        model = remote_model.SmallModel(remote_model.SmallConfig(calls, mask_token_id=MASK))
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "modeling_small.SmallConfig",
            "AutoModelForCausalLM": "modeling_small.SmallModel",
        }
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(remote_model.__file__, folder / "modeling_small.py")
        return T.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, attn_implementation=implementation
        ).eval()

    return made


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_is_bit_equal_sparse_and_restored(load, implementation):
    model = load(implementation=implementation)
    assert type(model).__module__.startswith("transformers_modules")
    pipe, ids, contexts = llada2(model), prompt(300), []
    padded = torch.cat([torch.zeros(1, 40, dtype=torch.long), ids], 1)
    mask = {"attention_mask": (padded != 0).long()}
    stock, stock_padded = written(pipe, ids), written(pipe, padded, **mask)

    def watch(call):
        contexts.append(call.context)
        return call.stock()

    attachment = attach(components(pipe)["model"], watch, pipe)
    assert torch.equal(written(pipe, ids), stock)
    assert torch.equal(written(pipe, padded, **mask), stock_padded)
    attachment.detach()
    assert {c.run for c in contexts} == {0, 1} and contexts[0].sigma == 1
    half = torch.cat([ids, torch.full((1, 16), 9), torch.full((1, 16), MASK)], 1)
    with sparse_dit.patch(pipe, "mage", keep=0.2) as handle:
        model(torch.cat([ids, torch.full((1, 32), MASK)], 1))
        few = model(half).logits
        written(pipe, padded, **mask)
        summary = handle.summary()
    assert summary.sparse_calls and summary.density < 0.9
    assert (few - model(half).logits).abs().max() > 1e-5
    assert torch.equal(written(pipe, ids), stock), "and nothing is left"


def test_one_whose_layers_call_torch_themselves_is_refused(load):
    with pytest.raises(
        NotImplementedError, match="SmallModel can't be patched: none of its layers"
    ):
        sparse_dit.patch(llada2(load("torch")), "mage")
