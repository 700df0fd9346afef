import pytest
import torch

from sparse_dit.attention import sparse_attention
from sparse_dit.eval.heads import head_quality
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.index import build_index
from sparse_dit.integrations import workload
from sparse_dit.integrations.diffusers import attach, components, heads_of
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from tests.helpers.tiny_pipelines import wan

SETTINGS = GenerationSettings(64, 64, 17, steps=2, guidance=3.0, max_sequence_length=16)
CASE = Case("a cat", 3)


@pytest.fixture(scope="module")
def pipe():
    return wan()[0]


def plan_with(pipe, pattern):
    module = components(pipe)["transformer"]
    config, layouts = module.config, []

    def look(call):
        layouts.append(call.context.layout)
        return call.stock()

    attachment = attach(module, look)
    workload(pipe, SETTINGS).run(CASE)
    attachment.detach()
    heads, rows = heads_of(module), ((HeadChoice(pattern),) * config.num_attention_heads,)
    part = ComponentPlan(
        type(module).__name__,
        config_hash(config),
        heads,
        layouts[0],
        (Stage(1.0, 0.0),),
        dict.fromkeys(heads, rows),
    )
    return Plan(type(pipe).__name__, {"transformer": part}, 0.5)


def test_error_and_recall_are_those_of_the_kernel(pipe):
    pattern = Pattern(Window(0, 1, 1), (1, 2, 2), far=True)
    plan = plan_with(pipe, pattern)
    found = head_quality(pipe, plan, CASE, SETTINGS)["transformer"]
    module = components(pipe)["transformer"]
    errors: dict[str, list[torch.Tensor]] = {}

    def compare(call):
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        index = build_index([pattern] * q.shape[1], call.context.layout)
        dense = call.stock().transpose(1, 2)
        with torch.no_grad():
            sparse = sparse_attention(q, k, v, index)
        part = torch.stack(
            [(sparse - dense).square().sum((0, 2, 3)), dense.square().sum((0, 2, 3))]
        )
        errors.setdefault(call.layer, []).append(part)
        return call.stock()

    attachment = attach(module, compare)
    workload(pipe, SETTINGS).run(CASE)
    attachment.detach()
    for (stage, layer), totals in found.items():
        total = torch.stack(errors[layer]).sum(0)
        exact = (total[0] / total[1]).sqrt()
        assert stage == 0
        # rows are a sample: 48 of 80 in each of the calls
        error = totals.relative_error[:, 0].float()
        torch.testing.assert_close(error, exact, rtol=0.25, atol=0.02)
        assert ((totals.recall > 0) & (totals.recall < 1)).all()


def test_dense_heads_have_no_error_and_full_recall(pipe):
    plan = plan_with(pipe, Pattern(Dense()))
    for totals in head_quality(pipe, plan, CASE, SETTINGS)["transformer"].values():
        assert (totals.relative_error == 0).all() and (totals.recall == 1).all()


def test_the_pipeline_is_stock_afterwards(pipe):
    before = workload(pipe, SETTINGS).run(CASE)[0]
    plan = plan_with(pipe, Pattern(Window(0, 1, 1), (1, 2, 2)))
    head_quality(pipe, plan, CASE, SETTINGS)
    assert (workload(pipe, SETTINGS).run(CASE)[0] == before).all()


def test_cells_smaller_than_tiles_are_refused(pipe):
    plan = plan_with(pipe, Pattern(Window(0, 1, 1), (2, 2, 2), cell=2))
    with pytest.raises(NotImplementedError, match="whole tiles only"):
        head_quality(pipe, plan, CASE, SETTINGS)
