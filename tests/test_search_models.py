"""The search on every kind of supported model: texts of any length, masks, tiny searches end to end."""

import functools

import numpy as np
import pytest
import torch

import sparse_dit
from sparse_dit.generation import Case
from sparse_dit.generation import generate as run
from sparse_dit.integrations.diffusers import attach, components
from sparse_dit.layout import TokenLayout
from sparse_dit.plan import Plan
from sparse_dit.search import engine, search_plan
from sparse_dit.search.cells import cell_table, sample_rows
from sparse_dit.search.cost import CostTable
from sparse_dit.search.merge import merge_profiles
from sparse_dit.search.profile_file import read_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.sampling import sampled_heads, whole_layout
from tests import tiny_image_models, tiny_image_transformers, tiny_pipelines, tiny_video_models
from tests.prompted import noise, prompted, settings_of

pytestmark = [
    # the host's own Chroma imports it from there
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for float32
]
PROMPTS = ("a cat plays the piano", "a dog")
HELD_OUT = "a red circle moves left"
SHORT, LONG = Case("a cat", 1), Case("a dog runs along the shore of a wide lake", 2)


class _Compared:
    """An intercept that compares what is recorded of sampled rows with what stock attention gives."""

    def __init__(self):
        self.calls, self.worst, self.skipped = 0, 0.0, 0

    def __call__(self, call):
        out, layout = call.stock(), whole_layout(call)
        if layout is None:
            self.skipped += 1
            return out
        rows = sample_rows(layout, 8, torch.Generator().manual_seed(0))
        table = cell_table(layout, (1, 8, 8))
        for number, (head, sampled) in enumerate(sampled_heads(call, layout, rows, None)):
            item = number // call.q.shape[2]
            wanted = out[item, rows, head]
            error = (sampled.by_cells(table).out - wanted).norm() / wanted.norm()
            self.worst = max(self.worst, float(error))
        self.calls += 1
        return out


def _forward(name):
    """Runs a transformer that no pipeline is built for."""
    if name in tiny_video_models.BUILDERS:
        transformer, calls = tiny_video_models.BUILDERS[name]()
        return transformer, lambda: tiny_video_models.run(transformer, calls)
    transformer, arguments = tiny_image_transformers.BUILDERS[name]()
    return transformer, lambda: tiny_video_models.run(transformer, [arguments])


def _generation(name):
    """Runs the first step of a pipeline with several items where it takes them."""
    for module in (tiny_pipelines, tiny_image_models):
        if name in module.BUILDERS:
            pipe, call = module.BUILDERS[name]()
            call = {
                **call,
                **getattr(module, "SEVERAL", {}).get(name, {}),
                "num_inference_steps": 1,
            }
            return pipe.transformer, lambda: module.generate(pipe, call)
    pipe, call = tiny_video_models.PIPELINES[name]()
    return pipe.transformer, lambda: tiny_pipelines.generate(pipe, call)


PIPELINES = [*tiny_pipelines.BUILDERS, *tiny_image_models.BUILDERS, *tiny_video_models.PIPELINES]
TRANSFORMERS = [*tiny_video_models.BUILDERS, *tiny_image_transformers.BUILDERS]


@pytest.mark.parametrize("name", dict.fromkeys([*PIPELINES, *TRANSFORMERS]))
def test_sampled_rows_are_what_stock_attention_gives(name):
    transformer, run_it = _generation(name) if name in PIPELINES else _forward(name)
    compared = _Compared()
    attachment = attach(transformer, compared)
    try:
        run_it()
    finally:
        attachment.detach()
    assert compared.calls and not compared.skipped
    assert compared.worst < 1e-4
