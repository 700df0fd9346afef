"""A plan on the same model with quantised weights: it is known again, and runs.

Run by `test_quantised.py` in a process of its own that sees torchao, which diffusers looks for at import.
"""

import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, TorchAoConfig, WanTransformer3DModel
from torchao.quantization import Int8WeightOnlyConfig

from sparse_dit import patch
from sparse_dit.plan import config_hash
from sparse_dit.search.front import model_hash
from sparse_dit.search.projection import projections
from tests.helpers.tiny_pipelines import generate, wan
from tests.test_patch import DENSE, FAR, plan_for

BLOCK = 32  # values that share a scale in Q8_0


def torchao(folder, tmp_path):
    """The transformer in `folder` with int8 weights."""
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=config)


def torchao_saved(folder, tmp_path):
    """The same, saved with its int8 weights and loaded again: the settings are a dict in its file."""
    torchao(folder, tmp_path).save_pretrained(tmp_path / "int8")
    return WanTransformer3DModel.from_pretrained(tmp_path / "int8")


def gguf_file(folder, tmp_path):
    """The same from one GGUF file, its matrices as Q8_0 where they have whole blocks."""
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    for name, weight in WanTransformer3DModel.from_pretrained(folder).state_dict().items():
        values = weight.float().numpy()
        whole = values.ndim == 2 and values.shape[1] % BLOCK == 0 and name.startswith("blocks.")
        kind = gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, kind) if whole else np.ascontiguousarray(values)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return WanTransformer3DModel.from_single_file(
        str(file),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )


EACH = pytest.mark.parametrize("load", [torchao, torchao_saved, gguf_file])


@EACH
def test_the_plan_of_a_model_runs_on_its_quantised_weights(load, tmp_path):
    pipe, call = wan()
    config = {**pipe.transformer.config, "attention_head_dim": BLOCK}
    pipe.transformer = WanTransformer3DModel.from_config(config).eval()
    sparse, dense = plan_for(pipe, FAR), plan_for(pipe, DENSE)
    pipe.transformer.save_pretrained(tmp_path / "model")
    full = generate(pipe, call)
    pipe.transformer = load(tmp_path / "model", tmp_path).eval()
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight) is not torch.nn.Parameter
    assert config_hash(pipe.transformer.config) == model_hash(sparse.components)
    stock = generate(pipe, call)
    assert not torch.equal(stock, full), "weights are quantised"
    with patch(pipe, dense):
        assert torch.equal(generate(pipe, call), stock)
    with patch(pipe, sparse) as handle:
        ours = generate(pipe, call)
        assert handle.summary().sparse_calls == 8
        assert handle.summary().dense_calls == 0
    assert ours.isfinite().all()
    assert not torch.equal(ours, stock)
    assert torch.equal(generate(pipe, call), stock)


@EACH
def test_a_search_weighs_heads_by_quantised_projections_too(load, tmp_path):
    """Within what eight bits lose, and not exactly as before."""
    pipe, _ = wan()
    full = WanTransformer3DModel.from_config(
        {**pipe.transformer.config, "attention_head_dim": BLOCK}
    )
    full.save_pretrained(tmp_path / "model")
    wanted = projections(full)
    found = projections(load(tmp_path / "model", tmp_path))
    assert found.keys() == wanted.keys() != set()
    for path, root in wanted.items():
        assert found[path].dtype == torch.float32
        assert 0 < (found[path] - root).norm() / root.norm() < 0.02
