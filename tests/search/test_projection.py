"""Errors of heads are measured behind the layer's output projection."""

import pytest
import torch

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.projection import projections
from tests.helpers import tiny_pipelines

SETTINGS = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
CASE = Case("a cat plays the piano", 0)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.wan()[0]


def test_the_roots_measure_what_heads_contribute_to_the_layers_output(pipe):
    transformer = pipe.transformer
    heads, head_dim = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    roots = projections(transformer)
    assert len(roots) == transformer.config.num_layers
    errors = torch.randn(heads, head_dim, generator=torch.Generator().manual_seed(0))
    for path, root in roots.items():
        linear = transformer.get_submodule(path).to_out[0]
        for head in range(heads):
            alone = torch.zeros(heads, head_dim)
            alone[head] = errors[head]
            truth = (alone.flatten() @ linear.weight.T.float()).norm()
            assert (errors[head] @ root[head]).norm() == pytest.approx(truth.item(), rel=1e-4)


def test_a_head_that_the_projection_drops_weighs_nothing(pipe):
    heads = pipe.transformer.config.num_attention_heads
    linear = pipe.transformer.blocks[0].attn1.to_out[0]
    kept = linear.weight.detach().clone()
    width = kept.shape[1] // heads
    try:
        with torch.no_grad():
            linear.weight[:, :width] = 0
        profile = profile_pipeline(pipe, [CASE], SETTINGS, rows=8)
    finally:
        with torch.no_grad():
            linear.weight.copy_(kept)
    part = profile.components["transformer"]
    for level in range(len(part.sigmas)):
        norm = part.scores[level, "blocks.0.attn1"]["norm"]
        assert norm[0] == pytest.approx(0, abs=1e-6 * norm.max().item())
        assert norm[1:].min() > 0
