"""Language models under a plan: what runs sparse, what stays stock, and that both are right."""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import sparse_dit
from sparse_dit.account import DECODE
from sparse_dit.plan import Plan, PlanError, config_hash
from sparse_dit.runtime import FEW_QUERIES
from tests.helpers.language_plans import DENSE, NEAR, SLASH, plan_for, run_beside_reference
from tests.helpers.tiny_language_models import TEXT, TEXT_MODELS, logits, text, vision

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")


def long(name="llama", batch=1, length=400):
    return text(name, batch, length)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_dense_plan_is_bit_equal_to_stock(name):
    model, inputs = text(name)
    want = logits(model, inputs)
    with sparse_dit.patch(model, plan_for(model, DENSE)) as handle:
        assert torch.equal(logits(model, inputs), want)
    assert handle.summary().sparse_calls == 0 and handle.summary().density == 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss", "deepseek_v3", "gemma3"])
@pytest.mark.parametrize("patterns", [(SLASH,), (NEAR,), (SLASH, DENSE, NEAR)])
def test_a_plan_computes_what_its_index_names(name, patterns):
    model, inputs = long(name)
    _, _, densities = run_beside_reference(model, inputs, plan_for(model, *patterns))
    assert len(densities) == 2 and all(0.05 < density < 0.8 for density in densities)


def test_the_handle_tells_what_ran():
    model, inputs = long()
    with sparse_dit.patch(model, plan_for(model, SLASH)) as handle, torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    summary = handle.summary()
    assert summary.sparse_calls == 2 and summary.dense_calls == 4
    assert 0.1 < summary.stages[0].density < 0.6
    assert summary.stages[-1].dense_calls == {DECODE: 4}
    assert "phase" not in str(summary) and "prefill" in str(summary)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_in_parts_follows_the_plan(kind):
    model, inputs = long()

    def run():
        cache = (
            DynamicCache(config=model.config)
            if kind == "dynamic"
            else StaticCache(config=model.config, max_cache_len=512)
        )
        with torch.no_grad():
            parts = inputs["input_ids"].split(192, 1)
            return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)

    want = run()
    with sparse_dit.patch(model, plan_for(model, SLASH)) as handle:
        got = run()
    summary = handle.summary()
    assert summary.sparse_calls >= 4 and summary.density < 0.7
    assert 0 < (got - want).abs().max() < want.abs().max()
    assert torch.nn.functional.cosine_similarity(got, want, dim=-1).mean() > 0.9


def test_parts_in_a_static_cache_are_as_in_a_growing_one():
    model, inputs = long()
    found = []
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=512),
    ):
        with sparse_dit.patch(model, plan_for(model, SLASH)) as handle, torch.no_grad():
            parts = inputs["input_ids"].split(192, 1)
            logits = [model(part, past_key_values=cache).logits for part in parts]
        found.append(torch.cat(logits, 1))
        assert {ran.tokens for ran in handle.ran["model"]} == {192, 384, 400}
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_for_the_others():
    model, inputs = long(batch=2)
    with sparse_dit.patch(model, plan_for(model, NEAR)):
        alone = logits(model, {"input_ids": inputs["input_ids"][:1, 100:]})
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :100] = 0
        got = logits(model, {**inputs, "attention_mask": mask})
    assert got.isfinite().all()
    assert torch.nn.functional.cosine_similarity(got[0, 100:], alone[0], dim=-1).min() > 0.9


def test_short_prompts_and_verification_steps_run_stock():
    model, inputs = long(length=200)
    plan = plan_for(model, SLASH, valid_tokens=(256, None))
    want = logits(model, inputs)
    with sparse_dit.patch(model, plan) as handle:
        assert torch.equal(logits(model, inputs), want)
    assert list(handle.summary().stages[0].dense_calls) == [
        "200 tokens are below the break-even of 256"
    ]
    few = {"input_ids": inputs["input_ids"][:, :12]}
    with sparse_dit.patch(model, plan_for(model, SLASH)) as handle:
        logits(model, few)
    assert handle.summary().stages[0].dense_calls == {FEW_QUERIES: 2}


def test_a_model_that_reads_both_ways_runs_stock(caplog):
    model, inputs = long("llama both ways")
    want = logits(model, inputs)
    with sparse_dit.patch(model, plan_for(model, SLASH)):
        assert torch.equal(logits(model, inputs), want)
    assert "a language model's plan is for causal order, and this call has none" in caplog.text


def test_a_vlms_text_layers_follow_a_plan():
    model, inputs = vision("qwen2_5_vl")
    more = torch.randint(5, 100, (1, 300))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 300))
    plan = plan_for(model, NEAR)
    with sparse_dit.patch(model, plan) as handle:
        logits(model, inputs)
    assert handle.summary().sparse_calls == 2


def test_a_plan_is_kept_in_a_file_and_is_for_its_architecture(tmp_path):
    model, inputs = long()
    plan_for(model, SLASH, DENSE).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path) == plan_for(model, SLASH, DENSE)
    with sparse_dit.patch(model, tmp_path / "plan.json") as handle:
        logits(model, inputs)
    assert handle.summary().sparse_calls == 2
    other, _ = long("mistral")
    with pytest.raises(
        PlanError, match="class must be LlamaForCausalLM as in the plan, got Mistral"
    ):
        sparse_dit.patch(other, tmp_path)
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "vocab_size": 256}))
    with pytest.raises(PlanError, match="config"):
        sparse_dit.patch(wider, tmp_path)


def test_what_a_model_is_doesnt_hang_on_how_it_is_kept(tmp_path):
    model, _ = long()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert config_hash(again.config) == config_hash(model.config)
    again.config.use_cache = False
    assert config_hash(again.config) == config_hash(model.config)
    again.config.rms_norm_eps = 0.1
    assert config_hash(again.config) != config_hash(model.config)


def test_sinks_under_the_nan_guard_run_stock(caplog):
    model, inputs = long("gpt_oss")
    want = logits(model, inputs)
    with sparse_dit.patch(model, plan_for(model, NEAR), nan_guard=True) as handle:
        assert torch.equal(logits(model, inputs), want)
    assert handle.summary().sparse_calls == 0
    assert "attention sinks, which nan_guard doesn't know" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"rms_norm_eps": 9.999999747378752e-06, "rope_theta": 100000.0},  # as a GGUF file has it
        {"initializer_range": 0.04, "pretraining_tp": 2, "eos_token_id": 7},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
    ],
    ids=["float32", "training", "unknown"],
)
def test_a_model_is_known_again_from_another_file(changed):
    facts = {**TEXT, "rms_norm_eps": 1e-5, "rope_theta": 100000}
    config = transformers.LlamaConfig(**facts)
    assert config_hash(transformers.LlamaConfig(**facts | changed)) == config_hash(config)
    for other in ({"rms_norm_eps": 1.1e-5}, {"rope_theta": 1e6}, {"num_hidden_layers": 3}):
        assert config_hash(transformers.LlamaConfig(**facts | other)) != config_hash(config)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_that_looks_both_ways_runs_stock_under_a_plan(padded, caplog):
    """A mask of padding alone says nothing of causal order."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, is_causal=False)).eval()
    ids = torch.randint(5, 100, (2, 400))
    mask = torch.ones_like(ids)
    mask[1, : 30 if padded else 0] = 0
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    want = logits(model, call)
    with sparse_dit.patch(model, plan_for(model, SLASH)) as handle:
        assert torch.equal(logits(model, call), want)
    assert handle.summary().sparse_calls == 0
    assert "causal order" in caplog.text
