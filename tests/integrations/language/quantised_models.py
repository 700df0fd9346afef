"""Language models with int8 weights: their plan knows them again. Run by `../test_quantised.py`."""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import sparse_dit
from sparse_dit.plan import config_hash
from tests.helpers.language_plans import DENSE, SLASH, plan_for
from tests.helpers.tiny_language_models import logits, text


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_plan_and_exact_mode_run_on_int8_weights(name, tmp_path):
    full, inputs = text(name, 1, 400)
    full.save_pretrained(tmp_path / "model")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    model.eval()
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    assert config_hash(model.config) == config_hash(full.config)
    stock = logits(model, inputs)
    assert not torch.equal(stock, logits(full, inputs)), "weights are quantised"
    with sparse_dit.patch(model, plan_for(full, DENSE)):
        assert torch.equal(logits(model, inputs), stock)
    with sparse_dit.patch(model, plan_for(full, SLASH)) as handle:
        assert not torch.equal(logits(model, inputs), stock)
    assert handle.summary().sparse_calls == 2 and handle.summary().dense_calls == 0
    with sparse_dit.patch(model, "exact") as handle:
        torch.testing.assert_close(logits(model, inputs), stock, rtol=1e-4, atol=1e-4)
    assert handle.summary().sparse_calls == 2
    assert torch.equal(logits(model, inputs), stock)
