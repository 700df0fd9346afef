import copy
import functools
import pickle
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from PIL import Image

from sparse_dit.call import with_bias
from sparse_dit.index import SparseIndex
from sparse_dit.integrations import processors
from sparse_dit.integrations.arrangement import Arrangement, image_first
from sparse_dit.integrations.diffusers import (
    attach,
    attachment_of,
    heads_of,
    self_attention_layers,
)
from sparse_dit.integrations.families import FAMILIES
from sparse_dit.integrations.families.family import warn_of_other_keys
from sparse_dit.layout import Segment, TokenLayout
from sparse_dit.patch import patch, unpatch
from sparse_dit.patterns import Pattern, Window
from sparse_dit.plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from tests.helpers import tiny_image_transformers
from tests.helpers.tiny_image_models import BUILDERS, SEVERAL, generate
from tests.helpers.tiny_pipelines import _t5, flux, hunyuan_video, tokenizer

# the host's own Chroma imports it from there
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
MODEL = pytest.mark.parametrize("name", BUILDERS)
NARROW = Pattern(Window(frames=0, rows=1, columns=1), tile=(1, 2, 2))
FAR = replace(NARROW, far=True)
WIDE = Pattern(Window(frames=99, rows=99, columns=99), tile=(1, 2, 2))

JOINT = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
LAYERS = {
    "flux2": [*JOINT, "single_transformer_blocks.1.attn"],
    "chroma": JOINT,
    "qwen": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
    "sd3": [
        "transformer_blocks.0.attn",
        "transformer_blocks.0.attn2",
        "transformer_blocks.1.attn",
    ],
    "pixart": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "zimage": ["layers.0.attention", "layers.1.attention"],
    "hunyuan_image": JOINT,
    "lumina": ["layers.0.attn", "layers.1.attn"],
    "cogview": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "hidream": [
        "double_stream_blocks.0.block.attn1",
        "single_stream_blocks.0.block.attn1",
        "single_stream_blocks.1.block.attn1",
    ],
}


def _square(before=0, after=0):
    return TokenLayout.video(1, 8, 8, text_before=before, text_after=after)


# layouts of the forwards of a step: one, or one a guidance branch
LAYOUTS = {
    "flux2": [_square(16), _square(16)],
    "chroma": [_square(16), _square(16)],
    "qwen": [_square(7), _square(5)],
    "sd3": [_square(0, 12)],
    "pixart": [_square()],
    "zimage": [_square(0, 64)],
    "hunyuan_image": [_square(0, 16), _square(0, 16)],
    "lumina": [_square(9), _square(4)],
    "cogview": [_square(16), _square(16)],
    "hidream": [_square(0, 18)],
}
SEVERAL_LAYOUTS = LAYOUTS | {
    "qwen": [_square(0, 7), _square(0, 5)],
    "zimage": [_square(0, 96)],
    "lumina": [_square(0, 9), _square(0, 11)],
}
# sigma of the two steps, from the schedulers' tables
SIGMAS = dict.fromkeys(BUILDERS, (1.0, 0.5)) | {
    "sd3": (1.0, 0.001),
    "pixart": (0.5, 0.0),
    "cogview": (1.0, 0.001),
    "hidream": (1.0, 0.001),
}
TWO_CALLS = {
    "flux2",
    "qwen",
    "hunyuan_image",
    "cogview",
    "chroma",
    "lumina",
}  # guidance not batched


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        return call.stock()


@functools.cache
def _built(name):
    pipe, call = BUILDERS[name]()
    return pipe, call, generate(pipe, call)


@functools.cache
def _several(name):
    pipe, call, _ = _built(name)
    call = {**call, **SEVERAL[name]}
    return pipe, call, generate(pipe, call)


@pytest.fixture(autouse=True)
def nothing_stays_patched(request):
    yield
    if name := getattr(request.node, "callspec", None) and request.node.callspec.params.get("name"):
        assert attachment_of(_built(name)[0].transformer) is None


def plan_for(transformer, pattern):
    heads = heads_of(transformer)
    part = ComponentPlan(
        layout=TokenLayout.video(1, 2, 2),
        stages=(Stage(1.0, 0.0),),
        layers={n: ((HeadChoice(pattern),) * num_heads,) for n, (num_heads, _) in heads.items()},
        model_class=type(transformer).__name__,
        config_hash=config_hash(transformer.config),
        heads=heads,
    )
    return Plan("Pipeline", {"transformer": part}, 0.4)


def run_sparse(pipe, call, pattern):
    """Output under a plan, after checking that every layer ran sparse in every forward."""
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    generate(pipe, call)
    attachment.detach()
    with patch(pipe, plan_for(pipe.transformer, pattern)) as handle:
        out = generate(pipe, call)
    ran = handle.ran["transformer"]
    assert {r.dense_because for r in ran} == {None}
    assert {r.layer for r in ran} == set(self_attention_layers(pipe.transformer))
    assert sum(r.calls for r in ran) == len(recorder.calls)
    return out, sum(r.computed for r in ran) / sum(r.pairs for r in ran)


def drift(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_models_that_ran_in_a_pipeline_are_told_so():
    built = {type(_built(name)[0].transformer).__name__ for name in BUILDERS}
    assert len(built) == len(BUILDERS)
    assert {FAMILIES[kind].tested for kind in built} == {"pipeline"}


@MODEL
def test_dense_is_bit_equal_and_removal_restores_the_objects(name):
    pipe, call, stock = _built(name)
    layers = self_attention_layers(pipe.transformer)
    before = {n: layer.processor for n, layer in layers.items()}
    attachment = attach(pipe.transformer, Recorder())
    assert torch.equal(generate(pipe, call), stock)
    attachment.detach()
    assert all(layer.processor is before[n] for n, layer in layers.items())
    assert torch.equal(generate(pipe, call), stock)
    assert stock.isfinite().all()


@MODEL
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_layers_layouts_heads_and_noise_levels(name, several):
    pipe, call, stock = (_several if several else _built)(name)
    layouts = (SEVERAL_LAYOUTS if several else LAYOUTS)[name]
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    assert torch.equal(generate(pipe, call), stock)
    attachment.detach()
    layers = LAYERS[name]
    assert list(self_attention_layers(pipe.transformer)) == layers
    assert [c.layer for c in recorder.calls] == layers * 2 * len(layouts)
    for number, c in enumerate(recorder.calls):
        step, forward = divmod(number // len(layers), len(layouts))
        want = layouts[forward]
        assert c.context.layout == (want.without_global() if c.layer.endswith(".attn2") else want)
        assert c.q.shape[1] == c.context.layout.seq_len
        assert c.q.shape[2:] == heads_of(pipe.transformer)[c.layer]
        assert c.context.sigma == pytest.approx(SIGMAS[name][step], abs=1e-4)
        assert c.context.branch == (("cond", "uncond")[forward] if name in TWO_CALLS else "any")
        assert (c.context.run, c.context.step) == (0, step)
        assert c.unsupported is None


@MODEL
def test_a_sparse_plan_runs_in_every_layer_and_changes_the_output(name):
    pipe, call, stock = _built(name)
    sparse, density = run_sparse(pipe, call, NARROW)
    assert sparse.isfinite().all()
    assert 0 < drift(sparse, stock) < 0.3
    assert density < 0.9
    assert torch.equal(generate(pipe, call), stock)


@MODEL
def test_backends_agree_on_several_prompts_with_a_far_field(name):
    pipe, call, stock = _several(name)
    outs = []
    for backend in ("reference", "gather", "auto"):
        with patch(pipe, plan_for(pipe.transformer, FAR), backend=backend):
            outs.append(generate(pipe, call))
    assert not torch.equal(outs[0], stock)
    torch.testing.assert_close(outs[1], outs[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(outs[2], outs[0], rtol=2e-4, atol=2e-4)


@MODEL
def test_several_prompts_in_inference_mode(name):
    pipe, call, stock = _several(name)
    with patch(pipe, plan_for(pipe.transformer, NARROW)):
        sparse = generate(pipe, call)
        with torch.inference_mode():
            assert torch.equal(generate(pipe, call), sparse)
    assert torch.equal(generate(pipe, call), stock)


@pytest.mark.parametrize("build", [flux, hunyuan_video])
def test_inference_mode_reads_ids_and_masks_once_a_forward(build, monkeypatch):
    reads = []
    original = processors._valid_prefix
    monkeypatch.setattr(processors, "_valid_prefix", lambda *a: reads.append(a) or original(*a))
    pipe, call = build()
    with patch(pipe, plan_for(pipe.transformer, NARROW)):
        sparse = generate(pipe, call)
        reads.clear()
        with torch.inference_mode():
            assert torch.equal(generate(pipe, call), sparse)
    assert len(reads) == (2 if build is hunyuan_video else 0)


@MODEL
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_window_as_wide_as_the_image_is_dense_attention(name, several, monkeypatch):
    pipe, call, stock = (_several if several else _built)(name)
    assert len(stock) == (4 if several else 1)
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    wide, density = run_sparse(pipe, call, WIDE)
    torch.testing.assert_close(wide, stock, rtol=2e-4, atol=2e-4)
    assert density == pytest.approx(1)


def forward(transformer, intercept=None, **inputs):
    """Output of one forward, and its attention calls."""
    recorder = Recorder()
    attachment = attach(transformer, intercept or recorder)
    with torch.no_grad():
        out = transformer(return_dict=False, **inputs)[0]
    attachment.detach()
    return out, recorder.calls


def _flux2_inputs(images=(), tokens=16):
    """Inputs of a forward with a 4 x 6 image and the ids of reference images after it."""
    parts = [torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 6, 1)))]
    for number, (rows, columns) in enumerate(images):
        grid = torch.cartesian_prod(*(torch.arange(n) for n in (1, rows, columns, 1)))
        parts.append(grid + torch.tensor([10 * (number + 1), 0, 0, 0]))
    ids = torch.cat(parts)[None]
    return {
        "hidden_states": torch.randn(1, ids.shape[1], 16),
        "encoder_hidden_states": torch.randn(1, tokens, 32),
        "timestep": torch.tensor([0.25]),
        "img_ids": ids,
        "txt_ids": torch.zeros(1, tokens, 4, dtype=torch.long),
    }


def test_reference_images_of_flux2_are_tokens_that_all_see():
    pipe, _, _ = _built("flux2")
    _, calls = forward(pipe.transformer, **_flux2_inputs([(2, 3), (4, 4)]))
    text, others = Segment.global_(16), Segment.global_(6 + 16)
    assert {c.context.layout for c in calls} == {TokenLayout((text, Segment.grid(1, 4, 6), others))}
    assert {c.q.shape[1] for c in calls} == {16 + 24 + 22}
    assert {c.context.sigma for c in calls} == {0.25}


def test_flux2_with_an_image_to_edit_in_its_pipeline(monkeypatch):
    pipe, call, plain = _built("flux2")
    image = Image.linear_gradient("L").resize((128, 96)).convert("RGB")
    stock = generate(pipe, call, image=image)
    assert not torch.equal(stock, plain)
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    assert torch.equal(generate(pipe, call, image=image), stock)
    attachment.detach()
    text, others = Segment.global_(16), Segment.global_(8 * 6)
    want = TokenLayout((text, Segment.grid(1, 8, 8), others))
    assert {c.context.layout for c in recorder.calls} == {want}
    sparse, _ = run_sparse(pipe, {**call, "image": image}, NARROW)
    assert 0 < drift(sparse, stock) < 0.3
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    wide, _ = run_sparse(pipe, {**call, "image": image}, WIDE)
    torch.testing.assert_close(wide, stock, rtol=2e-4, atol=2e-4)


def test_ids_of_flux2_that_do_not_start_with_an_image_give_no_layout():
    pipe, _, _ = _built("flux2")
    inputs = _flux2_inputs([(2, 3)])
    for ids in (inputs["img_ids"].flip(1), inputs["img_ids"].roll(6, 1), inputs["img_ids"][:, 1:]):
        tokens = inputs["hidden_states"][:, : ids.shape[1]]
        changed = {**inputs, "img_ids": ids, "hidden_states": tokens}
        _, calls = forward(pipe.transformer, **changed)
        assert {c.context.layout for c in calls} == {None}


def test_chroma_adds_its_mask_to_the_logits_and_masks_nothing():
    """What the plan's runtime computes with the bias is what the host computes with its mask."""
    pipe, call, _ = _built("chroma")
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    generate(pipe, call)
    attachment.detach()
    assert all(c.kv_len is None and c.unsupported is None for c in recorder.calls)
    for c in recorder.calls[:3]:
        assert torch.equal(c.bias[:, None, :, None] * c.bias[:, None, None, :], c.attn_mask)
        q, k, v = (x.transpose(1, 2).double() for x in with_bias(c.q, c.k, c.v, c.bias, 0.25))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2).double() for x in (c.q, c.k, c.v)), c.attn_mask.double()
        )
        torch.testing.assert_close(out[..., :16], want, rtol=1e-6, atol=1e-6)
        q, k, v = (x[..., :16] for x in (q, k, v))
        unmasked = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert not torch.allclose(unmasked, want, rtol=1e-3, atol=1e-3)


def _chroma_inputs(mask):
    return {
        "hidden_states": torch.randn(1, 24, 16),
        "encoder_hidden_states": torch.randn(1, 4, 32),
        "timestep": torch.tensor([0.25]),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6)),
        "txt_ids": torch.zeros(4, 3),
        "attention_mask": mask,
    }


def test_a_mask_of_chroma_without_padding_changes_nothing():
    pipe, _, _ = _built("chroma")
    inputs = _chroma_inputs(torch.ones(1, 28))
    out, calls = forward(pipe.transformer, **inputs)
    assert {(c.bias, c.unsupported) for c in calls} == {(None, None)}
    unmasked, _ = forward(pipe.transformer, **{**inputs, "attention_mask": None})
    torch.testing.assert_close(out, unmasked)


def test_a_mask_of_chroma_that_really_masks_runs_dense_with_a_reason():
    pipe, _, _ = _built("chroma")
    inputs = _chroma_inputs((torch.arange(28) != 2)[None])
    stock, calls = forward(pipe.transformer, **inputs)
    assert {c.unsupported for c in calls} == {"a dense mask (1, 1, 28, 28) of torch.bool"}
    with patch(pipe.transformer, plan_for(pipe.transformer, NARROW)) as handle, torch.no_grad():
        out = pipe.transformer(return_dict=False, **inputs)[0]
    assert torch.equal(out, stock)
    reasons = {r.dense_because for r in handle.ran["transformer"]}
    assert reasons == {"the host asked for a dense mask (1, 1, 28, 28) of torch.bool"}


def _qwen_inputs(shapes, mask=None):
    images = sum(f * h * w for f, h, w in shapes[0])
    return {
        "hidden_states": torch.randn(len(shapes), images, 16),
        "encoder_hidden_states": torch.randn(len(shapes), 5, 32),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.25]).expand(len(shapes)),
        "img_shapes": shapes,
    }


def test_edited_images_of_qwen_are_tokens_that_all_see(monkeypatch):
    pipe, _, _ = _built("qwen")
    shapes = [[(1, 6, 8), (1, 4, 4), (1, 2, 5)]] * 2
    image, others = Segment.grid(1, 6, 8), (Segment.global_(16), Segment.global_(10))
    _, calls = forward(pipe.transformer, **_qwen_inputs(shapes))
    assert {c.context.layout for c in calls} == {TokenLayout((Segment.global_(5), image, *others))}
    inputs = _qwen_inputs(shapes, torch.arange(5) < torch.tensor([[5], [2]]))
    stock, calls = forward(pipe.transformer, **inputs)
    assert {c.context.layout for c in calls} == {TokenLayout((image, Segment.global_(5 + 26)))}
    assert {tuple(c.kv_len.tolist()) for c in calls} == {(79, 76)}
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    with patch(pipe.transformer, plan_for(pipe.transformer, WIDE)) as handle, torch.no_grad():
        out = pipe.transformer(return_dict=False, **inputs)[0]
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4)
    assert {r.dense_because for r in handle.ran["transformer"]} == {None}


def test_images_of_several_sizes_in_a_batch_of_qwen_give_no_layout():
    pipe, _, _ = _built("qwen")
    _, calls = forward(pipe.transformer, **_qwen_inputs([[(1, 4, 6)], [(1, 6, 4)]]))
    assert {c.context.layout for c in calls} == {None}


def test_valid_text_of_qwen_need_not_come_first():
    pipe, _, _ = _built("qwen")
    mask = torch.tensor([[True, False, True, False, True]])
    inputs = _qwen_inputs([[(1, 4, 6)]], mask)
    _, calls = forward(pipe.transformer, **inputs)
    assert {tuple(c.kv_len.tolist()) for c in calls} == {(27,)}
    call = calls[0]
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k[:, :27], call.v[:, :27]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(call.stock(), want)


@pytest.mark.parametrize("items", [1, 2])
def test_a_layer_called_on_part_of_the_batch_runs_dense_with_a_reason(items):
    pipe, _, _ = _built("qwen")
    inputs = _qwen_inputs([[(1, 4, 6)]] * 2, torch.arange(5) < torch.tensor([[5], [2]]))
    layer = pipe.transformer.transformer_blocks[0].attn
    part = {
        "hidden_states": torch.randn(items, 24, 32),
        "encoder_hidden_states": torch.randn(items, 5, 32),
        "encoder_hidden_states_mask": inputs["encoder_hidden_states_mask"][:items],
    }
    with torch.no_grad():
        stock = layer(**part)
        with patch(pipe.transformer, plan_for(pipe.transformer, NARROW)) as handle:
            pipe.transformer(return_dict=False, **inputs)
            out = layer(**part)
    reason = "the host asked for a mask of other tokens than the forward's"
    reasons = {r.dense_because for r in handle.ran["transformer"]}
    assert reasons == ({None} if items == 2 else {None, reason})
    assert torch.equal(out[0], stock[0]) == (items == 1)


def test_tokens_are_put_image_first_and_back():
    """Items with 1 and 3 valid tokens before an image of 4, and padding after it."""
    valid = torch.arange(8) < torch.tensor([[5], [7]])
    arrangement = image_first(valid, torch.tensor([1, 3]), TokenLayout.video(1, 2, 2))
    assert arrangement.layout == TokenLayout.video(1, 2, 2, text_after=4)
    assert arrangement.order.tolist() == [[1, 2, 3, 4, 0, 5, 6, 7], [3, 4, 5, 6, 0, 1, 2, 7]]
    assert arrangement.kv_len.tolist() == [5, 7]
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(arrangement.arrange(x)[1, :, 0, 0], x[1, [3, 4, 5, 6, 0, 1, 2, 7], 0, 0])
    assert torch.equal(arrangement.restore(arrangement.arrange(x)), x)
    assert Arrangement(arrangement.layout).restore(x) is x


def _zimage_inputs(images, captions, **more):
    return {"x": images, "t": torch.full((len(images),), 0.25), "cap_feats": captions, **more}


def test_images_of_z_image_are_padded_and_must_share_a_size():
    pipe, _, _ = _built("zimage")
    image, caption = torch.randn(4, 1, 12, 14), torch.randn(33, 32)
    _, calls = forward(pipe.transformer, **_zimage_inputs([image], [caption]))
    assert {c.context.layout for c in calls} == {
        TokenLayout.video(1, 6, 7, text_after=64 - 42 + 64)
    }
    assert {c.q.shape[1] for c in calls} == {128}
    assert {c.context.sigma for c in calls} == {0.75}
    images = [image, image.transpose(2, 3)]
    _, calls = forward(pipe.transformer, **_zimage_inputs(images, [caption, caption]))
    assert {c.context.layout for c in calls} == {None}


def test_lists_of_images_of_z_image_give_no_layout():
    pipe, _, _ = _built("zimage")
    image, caption = torch.randn(4, 1, 8, 8), torch.randn(5, 32)
    omni = {"siglip_feats": [None], "image_noise_mask": [[0, 1]]}
    inputs = _zimage_inputs([[image, image]], [[caption, caption]], **omni)
    _, calls = forward(pipe.transformer, **inputs)
    assert {c.context.layout for c in calls} == {None}


def test_an_image_of_hidream_that_is_not_square_is_padded_by_tokens_that_all_see():
    pipe, call, _ = _built("hidream")
    stock = generate(pipe, call, height=96, width=160)
    sparse, _ = run_sparse(pipe, {**call, "height": 96, "width": 160}, NARROW)
    assert 0 < drift(sparse, stock) < 0.3
    recorder = Recorder()
    attachment = attach(pipe.transformer, recorder)
    generate(pipe, call, height=96, width=160)
    attachment.detach()
    (layout,) = {c.context.layout for c in recorder.calls}
    _, rows, columns = layout.grid
    assert rows < columns
    assert layout == TokenLayout.video(1, rows, columns, text_after=64 - rows * columns + 18)


def test_packed_tokens_of_hidream_give_no_layout():
    pipe, _, _ = _built("hidream")
    ids = torch.zeros(1, 64, 3)
    ids[0, :24] = torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 6))).float()
    _, calls = forward(
        pipe.transformer,
        hidden_states=torch.randn(1, 64, 16),
        timesteps=torch.tensor([250]),
        encoder_hidden_states_t5=torch.randn(1, 6, 32),
        encoder_hidden_states_llama3=torch.randn(2, 1, 6, 32),
        pooled_embeds=torch.randn(1, 16),
        img_ids=ids,
        img_sizes=[(4, 6)],
        hidden_states_masks=(torch.arange(64) < 24).float()[None],
    )
    assert {c.context.layout for c in calls} == {None}
    assert {c.context.sigma for c in calls} == {0.25}


def test_one_text_encoder_of_hunyuan_image_is_enough():
    pipe, _, _ = _built("hunyuan_image")
    _, calls = forward(
        pipe.transformer,
        hidden_states=torch.randn(1, 4, 4, 6),
        timestep=torch.tensor([250.0]),
        encoder_hidden_states=torch.randn(1, 5, 32),
        encoder_attention_mask=torch.ones(1, 5),
    )
    assert {c.context.layout for c in calls} == {TokenLayout.video(1, 4, 6, text_after=5)}


@pytest.mark.parametrize("name", ["chroma", "qwen", "lumina", "sd3"])
def test_copies_and_pickles_keep_what_is_known_of_masks(name):
    pipe, call, stock = _several(name)
    with patch(pipe, plan_for(pipe.transformer, NARROW)):
        sparse = generate(pipe, call)
        twin = copy.deepcopy(pipe)
        pickled = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(generate(pipe, call), stock)
    assert torch.equal(generate(twin, call), sparse)
    twin.transformer = pickled
    assert torch.equal(generate(twin, call), sparse)
    unpatch(twin)
    assert torch.equal(generate(twin, call), stock)


def test_chroma_with_prompts_and_their_encoder(monkeypatch):
    """The pipeline itself makes the masks, one more token than the prompt has."""
    pipe, call, _ = _built("chroma")
    whole = diffusers.ChromaPipeline(
        pipe.scheduler, None, _t5(), tokenizer(), pipe.transformer.eval()
    )
    whole.set_progress_bar_config(disable=True)
    call = {key: call[key] for key in ("height", "width", "num_inference_steps", "output_type")}
    call |= {"prompt": ["a cat", "a red circle moves left"], "negative_prompt": ["", "gray"]}
    call |= {"max_sequence_length": 16, "num_images_per_prompt": 1, "guidance_scale": 3.0}
    stock = generate(whole, call)
    assert len(stock) == 2
    sparse, _ = run_sparse(whole, call, NARROW)
    assert 0 < drift(sparse, stock) < 0.3
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    wide, _ = run_sparse(whole, call, WIDE)
    torch.testing.assert_close(wide, stock, rtol=2e-4, atol=2e-4)


def test_frames_of_hunyuan_image_refiners_are_frames():
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 2, 2),
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 8),
    )
    _, calls = forward(
        transformer,
        hidden_states=torch.randn(1, 4, 3, 8, 12),
        timestep=torch.tensor([250.0]),
        encoder_hidden_states=torch.randn(1, 5, 32),
        encoder_attention_mask=torch.ones(1, 5),
    )
    assert {c.context.layout for c in calls} == {TokenLayout.video(3, 4, 6, text_after=5)}


BARE = pytest.mark.parametrize("bare", tiny_image_transformers.BUILDERS)
BARE_LAYERS = dict.fromkeys(("longcat", "ovis", "bria", "bria_fibo"), JOINT) | {
    "krea2": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
    "auraflow": ["joint_transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    "cogview3": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "glm": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "ernie": ["layers.0.self_attention", "layers.1.self_attention"],
    "flux3": ["mode_blocks.image.0.attn", "single_transformer_blocks.0.attn"],
    "dit": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "hunyuan_dit": ["blocks.0.attn1", "blocks.1.attn1"],
    "prx": ["blocks.0.attention", "blocks.1.attention"],
    "nucleus": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
    "ideogram": ["layers.0.attention", "layers.1.attention"],
    "joyimage_plus": ["double_blocks.0.attn", "double_blocks.1.attn"],
    "lumina_next": ["layers.0.attn1", "layers.1.attn1"],
    "bria_fibo2": ["layers.0.attention", "layers.1.attention"],
}
_IMAGE = Segment.grid(1, 4, 6)
_TEXT_FIRST, _IMAGE_FIRST = (
    TokenLayout((Segment.global_(7), _IMAGE)),
    TokenLayout((_IMAGE, Segment.global_(7))),
)
BARE_LAYOUT = {
    "longcat": TokenLayout((Segment.global_(7), _IMAGE, Segment.global_(10))),
    "ovis": _TEXT_FIRST,
    "bria": _TEXT_FIRST,
    "bria_fibo": _IMAGE_FIRST,
    "krea2": _IMAGE_FIRST,
    "auraflow": TokenLayout((Segment.global_(15), _IMAGE)),
    "cogview3": _TEXT_FIRST,
    "glm": _TEXT_FIRST,
    "ernie": _IMAGE_FIRST,
    "flux3": TokenLayout((Segment.global_(7), _IMAGE, Segment.global_(10))),
    "dit": TokenLayout((_IMAGE,)),
    "hunyuan_dit": TokenLayout((_IMAGE,)),
    "ideogram": _TEXT_FIRST,
    "lumina_next": TokenLayout((_IMAGE,)),
    **dict.fromkeys(("prx", "nucleus", "joyimage_plus", "bria_fibo2"), _IMAGE_FIRST),
}
BARE_PADDED = ("bria_fibo", "krea2", "ernie", "prx", "nucleus", "joyimage_plus", "bria_fibo2")


@functools.cache
def _bare(bare):
    transformer, inputs = tiny_image_transformers.BUILDERS[bare]()
    with torch.no_grad():
        return transformer, inputs, transformer(return_dict=False, **inputs)[0]


@BARE
def test_bare_transformers_are_told_so_and_bit_equal_through_the_seam(bare):
    transformer, inputs, stock = _bare(bare)
    assert FAMILIES[type(transformer).__name__].tested == "transformer"
    out, calls = forward(transformer, **inputs)
    assert torch.equal(out, stock)
    assert list(self_attention_layers(transformer)) == BARE_LAYERS[bare]
    assert [c.layer for c in calls] == BARE_LAYERS[bare]
    for c in calls:
        alone = c.layer.startswith("mode_blocks")
        layout = BARE_LAYOUT[bare].without_global() if alone else BARE_LAYOUT[bare]
        assert c.context.layout == layout
        assert c.context.sigma == 0.25
        assert c.q.shape[1:] == (layout.seq_len, *heads_of(transformer)[c.layer])
        assert c.unsupported is None
    padded = bare in BARE_PADDED
    assert {tuple(c.kv_len.tolist()) if padded else c.kv_len for c in calls} == {
        (31, 28) if padded else None
    }
    with torch.no_grad():
        assert torch.equal(transformer(return_dict=False, **inputs)[0], stock)


@BARE
def test_bare_transformers_run_sparse(bare, monkeypatch):
    transformer, inputs, stock = _bare(bare)
    for pattern, all_sparse in ((NARROW, False), (WIDE, True)):
        if all_sparse:
            monkeypatch.setattr(SparseIndex, "is_dense", False)
        with patch(transformer, plan_for(transformer, pattern)) as handle, torch.no_grad():
            out = transformer(return_dict=False, **inputs)[0]
        ran = handle.ran["transformer"]
        assert {(r.layer, r.dense_because) for r in ran} == {(n, None) for n in BARE_LAYERS[bare]}
        if all_sparse:
            torch.testing.assert_close(out, stock, rtol=2e-4, atol=2e-4)
        else:
            assert out.isfinite().all()
            assert 0 < drift(out, stock) < 0.5


def test_cached_keys_of_reference_images_are_told(caplog):
    warn_of_other_keys.cache_clear()
    pipe, _, _ = _built("flux2")
    transformer = pipe.transformer
    before = {n: m.processor for n, m in self_attention_layers(transformer).items()}
    for name, layer in self_attention_layers(transformer).items():
        single = name.startswith("single")
        layer.set_processor(
            Flux2KVParallelSelfAttnProcessor() if single else Flux2KVAttnProcessor()
        )
    inputs = _flux2_inputs([(2, 3)])
    for key in ("img_ids", "hidden_states"):
        inputs[key] = inputs[key].roll(6, 1)  # this variant puts reference images first
    inputs |= {"kv_cache_mode": "extract", "num_ref_tokens": 6}
    _, calls = forward(transformer, **inputs)
    forward(transformer, **inputs)
    assert not calls
    for name, layer in self_attention_layers(transformer).items():
        layer.set_processor(before[name])
    (record,) = (r for r in caplog.records if r.name == "sparse_dit")
    assert record.message.startswith("Flux2 with kv_cache_mode attends to cached keys")


@pytest.mark.parametrize("mode", ["write", "read"])
def test_glm_image_with_keys_of_images_that_it_edits(mode):
    warn_of_other_keys.cache_clear()
    transformer, inputs, _ = _bare("glm")
    caches = GlmImageKVCache(2)
    caches.set_mode("write")
    inputs = {**inputs, "kv_caches": caches, "attention_mask": None}
    written, calls = forward(transformer, **inputs)
    assert {c.context.layout for c in calls} == {BARE_LAYOUT["glm"]}
    if mode == "read":
        caches.set_mode("read")
        out, calls = forward(transformer, **inputs)
        assert not calls
        assert not torch.allclose(out, written)


def test_a_text_mask_of_cogview_is_added_to_the_logits(monkeypatch):
    pipe, _, _ = _built("cogview")
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([250]),
        "original_size": torch.tensor([[64.0, 96.0]]),
        "target_size": torch.tensor([[64.0, 96.0]]),
        "crop_coords": torch.zeros(1, 2),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    }
    stock, calls = forward(pipe.transformer, **inputs)
    assert {tuple(c.bias[0, :6].tolist()) for c in calls} == {(1, 1, 1, 0, 0, 1)}
    monkeypatch.setattr(SparseIndex, "is_dense", False)
    with patch(pipe.transformer, plan_for(pipe.transformer, WIDE)) as handle, torch.no_grad():
        out = pipe.transformer(return_dict=False, **inputs)[0]
    assert {r.dense_because for r in handle.ran["transformer"]} == {None}
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4)
    _, calls = forward(pipe.transformer, **{**inputs, "attention_mask": torch.ones(1, 5)})
    assert {(c.bias, c.unsupported) for c in calls} == {(None, None)}


def test_an_empty_prompt_of_lumina_has_no_text_tokens():
    pipe, call, _ = _built("lumina")
    negative = torch.zeros_like(call["negative_prompt_attention_mask"])
    call = {**call, "negative_prompt_attention_mask": negative}
    stock, recorder = generate(pipe, call), Recorder()
    attachment = attach(pipe.transformer, recorder)
    patched = generate(pipe, call)
    attachment.detach()
    assert torch.equal(patched, stock)
    assert {c.context.layout for c in recorder.calls} == {_square(9), _square()}
