"""What people do with a patched model of transformers: generate, compile, copy, save, in threads."""

import copy
import json
import threading

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import sparse_dit
from sparse_dit import exact
from sparse_dit.account import DECODE
from sparse_dit.exact import LEAST_PAIRS, SHORT
from sparse_dit.integrations import attach, attachment_of
from tests.helpers.tiny_language_models import TEXT, logits, text, vision

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")  # hosts' own, of generation settings

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "chunks": {"do_sample": False, "prefill_chunk_size": 8},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


def generated(model, inputs, **how):
    torch.manual_seed(1)
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **how)


def one(name, length=30):
    return text(name, batch=1, length=length)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_that_of_stock(way, name):
    model, inputs = one(name)
    how = WAYS[way]
    want = generated(model, inputs, **how)
    attachment = attach(model, lambda call: call.stock())
    assert torch.equal(generated(model, inputs, **how), want)
    attachment.detach()
    with sparse_dit.patch(model, "exact") as handle:
        got = generated(model, inputs, **how)
    assert handle.summary().sparse_calls > 0
    assert torch.equal(got, want), "rounding alone changes no choice of these models"
    assert torch.equal(generated(model, inputs, **how), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_prompts_with_padding(side):
    model, inputs = text("llama", batch=3, length=24)
    mask = torch.ones_like(inputs["input_ids"])
    for item, cut in enumerate((0, 5, 11)):
        mask[item, slice(0, cut) if side == "left" else slice(24 - cut, 24)] = 0
    inputs["attention_mask"] = mask
    want = generated(model, inputs, do_sample=False)
    with sparse_dit.patch(model, "exact"):
        assert torch.equal(generated(model, inputs, do_sample=False), want)


def test_assisted_decoding_with_a_draft_model():
    model, inputs = one("llama")
    draft, _ = one("mistral")
    want = generated(model, inputs, do_sample=False, assistant_model=draft)
    with sparse_dit.patch(model, "exact"), sparse_dit.patch(draft, "exact"):
        got = generated(model, inputs, do_sample=False, assistant_model=draft)
    assert torch.equal(got, want)


def test_a_video_prompt_is_answered_as_by_stock():
    model, inputs = vision("qwen2_5_vl")
    want = generated(model, inputs, do_sample=False)
    with sparse_dit.patch(model, "exact") as handle:
        assert torch.equal(generated(model, inputs, do_sample=False), want)
    assert handle.summary().sparse_calls == 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_in_parts_onto_a_cache(name, kind):
    model, inputs = one(name)

    def run():
        cache = (
            DynamicCache(config=model.config)
            if kind == "dynamic"
            else StaticCache(config=model.config, max_cache_len=64)
        )
        with torch.no_grad():
            parts = inputs["input_ids"].split(12, 1)
            return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)

    want = run()
    with sparse_dit.patch(model, "exact") as handle:
        got = run()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert handle.summary().dense_calls == 0


def test_a_prefix_is_read_once_and_used_for_several_questions():
    model, inputs = one("llama")
    prefix, questions = inputs["input_ids"][:, :20], inputs["input_ids"][:, 20:].split(5, 1)

    def run():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prefix, past_key_values=cache)
            return [
                generated(
                    model,
                    {"input_ids": torch.cat([prefix, question], 1)},
                    past_key_values=copy.deepcopy(cache),
                    do_sample=False,
                )
                for question in questions
            ]

    want = run()
    with sparse_dit.patch(model, "exact") as handle:
        got = run()
    assert all(map(torch.equal, got, want)) and handle.summary().sparse_calls > 4


def test_short_calls_and_decoding_are_left_to_stock(monkeypatch):
    model, inputs = one("llama", length=100)
    want = logits(model, inputs)
    monkeypatch.setattr(exact, "LEAST_PAIRS", LEAST_PAIRS)
    with sparse_dit.patch(model, "exact") as handle:
        assert torch.equal(logits(model, inputs), want)
        generated(model, one("llama", length=200)[1], do_sample=False)
    calls = {(ran.dense_because, ran.tokens): ran.calls for ran in handle.ran["model"]}
    assert calls == {(SHORT, 100): 1, (None, 200): 1, (DECODE, 205): 5}


def test_packed_sequences_see_their_own_tokens_alone():
    model, inputs = one("llama")
    places = torch.cat([torch.arange(10), torch.arange(20)])[None]
    call = {**inputs, "position_ids": places, "use_cache": False}
    want = logits(model, call)
    with sparse_dit.patch(model, "exact") as handle:
        got = logits(model, call)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert handle.summary().density < 0.4
    alone = logits(model, {"input_ids": inputs["input_ids"][:, :10]})
    torch.testing.assert_close(got[:, :10], alone, rtol=1e-5, atol=1e-5)


def test_a_mask_with_a_hole_runs_stock_and_says_so(caplog):
    model, inputs = one("llama")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 12] = 0
    call = {**inputs, "attention_mask": mask}
    want = logits(model, call)
    with sparse_dit.patch(model, "exact") as handle:
        assert torch.equal(logits(model, call), want)
    assert handle.summary().sparse_calls == 0
    assert "isn't one interval of keys for each query" in caplog.text
    assert caplog.text.count("runs dense attention") == 1


def test_attention_maps_and_gradients_are_stocks():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(5, 100, (1, 20))
    want = model(ids, output_attentions=True)
    with sparse_dit.patch(model, "exact"):
        got = model(ids, output_attentions=True)
        got.logits.sum().backward()
    assert len(got.attentions) == 2
    assert all(map(torch.equal, got.attentions, want.attentions))
    assert torch.equal(got.logits, want.logits)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_both_stock_implementations_come_back(stock):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=stock).eval()
    inputs = {"input_ids": torch.randint(5, 100, (1, 20))}
    want = logits(model, inputs)
    with sparse_dit.patch(model, "exact") as handle:
        torch.testing.assert_close(logits(model, inputs), want, rtol=1e-5, atol=1e-5)
        assert handle.summary().sparse_calls == 2
    assert model.config._attn_implementation == stock
    assert torch.equal(logits(model, inputs), want)


def test_an_implementation_that_is_not_replaced_is_named():
    model, _ = one("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match="attn_implementation='flex_attention'"):
        sparse_dit.patch(model, "exact")
    assert attachment_of(model) is None


def test_an_implementation_set_later_is_reported():
    model, inputs = one("llama")
    handle = sparse_dit.patch(model, "exact")
    model.set_attn_implementation("eager")
    logits(model, inputs)
    assert len(handle.summary().lost["model"]) == 2
    handle.remove()
    assert model.config._attn_implementation == "eager"


def test_another_model_of_the_process_is_untouched():
    (one_model, inputs), (other, _) = one("llama"), one("llama")
    with sparse_dit.patch(one_model, "exact") as handle:
        logits(other, inputs)
        assert handle.summary().sparse_calls == 0
        with sparse_dit.patch(other, "exact") as second:
            logits(other, inputs)
        assert handle.summary().sparse_calls == 0 and second.summary().sparse_calls == 2


def test_copies_are_patched_on_their_own():
    model, inputs = one("gemma3")
    want = logits(model, inputs)
    handle = sparse_dit.patch(model, "exact")
    close = logits(model, inputs)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(logits(model, inputs), want)
    assert torch.equal(logits(twin, inputs), close)
    generated(twin, inputs, do_sample=False)
    ran = attachment_of(twin).intercept.ran
    assert sum(one.calls for one in ran if one.dense_because == DECODE) == 2 * 5
    sparse_dit.unpatch(twin)
    assert torch.equal(logits(twin, inputs), want)


def test_threads_with_a_model_each():
    models = [one(name) for name in ("llama", "gemma3", "qwen2")]
    want = [logits(*made) for made in models]
    got = [None] * 3

    def run(place):
        with sparse_dit.patch(models[place][0], "exact"):
            for _ in range(5):
                got[place] = logits(*models[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, stock in zip(got, want, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model, inputs = one("llama")
    with sparse_dit.patch(model, "exact"):
        model.save_pretrained(tmp_path)
    assert "sparse_dit" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_one_token():
    model, _ = one("llama")
    with sparse_dit.patch(model, "exact"):
        assert logits(model, {"input_ids": torch.tensor([[7]])}).shape == (1, 1, 128)


@pytest.mark.fresh
@pytest.mark.parametrize("order", ["patched first", "compiled first"])
def test_compiled_models_stay_one_graph(order):
    torch.compiler.reset()
    model, inputs = one("llama")
    want = logits(model, inputs)
    if order == "patched first":
        handle = sparse_dit.patch(model, "exact")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        handle = sparse_dit.patch(compiled, "exact")
    got = logits(compiled, inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert handle.summary().sparse_calls == 2
    handle.remove()
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.fresh
def test_the_first_forward_is_like_later_ones():
    model, inputs = one("gemma3")
    with sparse_dit.patch(model, "exact"):
        first = logits(model, inputs)
        assert torch.equal(logits(model, inputs), first)
    torch.testing.assert_close(first, logits(model, inputs), rtol=1e-5, atol=1e-5)


def test_under_inference_mode_and_autocast():
    model, inputs = one("gemma3")
    with torch.inference_mode():
        want = model(**inputs).logits
        with sparse_dit.patch(model, "exact") as handle:
            got = model(**inputs).logits
            assert handle.summary().sparse_calls == 2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        want = logits(model, inputs)
        with sparse_dit.patch(model, "exact"):
            got = logits(model, inputs)
    assert got.dtype == want.dtype
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_text_generation_pipelines_are_patched_as_models_are():
    model, _ = one("llama")

    class Pipe:
        def __init__(self, held):
            self.model = held

    Pipe.__module__ = "transformers.pipelines.text_generation"
    with sparse_dit.patch(Pipe(model), "exact"):
        assert attachment_of(model) is not None
    assert attachment_of(model) is None


@pytest.mark.parametrize("thing", [transformers.LlamaForCausalLM, transformers.LlamaConfig()])
def test_what_is_no_model_is_named(thing):
    with pytest.raises(TypeError, match=r"LlamaForCausalLM is a class|LlamaConfig is no model"):
        sparse_dit.patch(thing, "exact")


def test_a_model_off_the_interface_is_named():
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(NotImplementedError, match="AttentionInterface"):
        sparse_dit.patch(transformers.BloomForCausalLM(config), "exact")
