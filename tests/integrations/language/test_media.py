"""Where images and videos lie in a VLM's tokens: in forwards, generation, chunks, batches."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache

from sparse_dit.integrations import attach
from sparse_dit.integrations.language import grids
from sparse_dit.integrations.language.media import BEFORE, COMPILED, CROPPED, NO_IDS, Media
from sparse_dit.modalities import Modalities, Part
from tests.helpers.tiny_language_models import (
    IMAGE,
    START,
    VIDEO,
    VISION_MODELS,
    text,
    tokens,
    vision,
)

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

PLACES = {  # kind, start, stop, grid of the prompts in tests/helpers/tiny_language_models.py
    "qwen2_vl": [("video", 6, 24, (3, 2, 3))],
    "qwen2_5_vl": [("video", 6, 24, (3, 2, 3))],
    "qwen3_vl": [("video", at, at + 6, (1, 2, 3)) for at in (9, 20, 31)],
    "glm4v": [("video", at, at + 6, (1, 2, 3)) for at in (7, 17, 27)],
    "llava_onevision": [("video", 4, 16, (3, 2, 2))],  # and a line break behind
    "llava_next_video": [("video", 4, 16, (3, 2, 2))],
    "internvl": [("image", at, at + 4, (1, 2, 2)) for at in (3, 10)],
    "smolvlm": [("image", at, at + 4, (1, 2, 2)) for at in (3, 10)],
    "gemma3": [("image", 4, 8, (1, 2, 2))],
    "gemma4": [("image", 3, 7, (1, 2, 2))],
    "mistral3": [("image", 3, 7, (1, 2, 2))],
    "paligemma": [("image", 0, 16, (1, 4, 4))],
}


class Watched:
    """The modalities of each call of a model's last layer, which sees all tokens in every family."""

    def __init__(self, model):
        self.calls = []
        self.attachment = attach(model, self)
        self.last = list(self.attachment.layers)[-1]

    def __call__(self, call):
        if call.layer == self.last:
            self.calls.append((call.q.shape[1], call.k.shape[1], call.context.modalities))
        return call.stock()

    def take(self):
        calls, self.calls = self.calls, []
        self.attachment.detach()
        return calls


def run(model, inputs):
    watched = Watched(model)
    with torch.no_grad():
        model(**inputs)
    ((_, _, found),) = watched.take()
    return found


def generated(model, inputs, **how):
    model.generation_config.pad_token_id = 0
    watched = Watched(model)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **how)
    return watched.take()


def places(item):
    assert item.unknown is None
    return [(part.kind, part.start, part.stop, part.grid) for part in item.media]


def test_every_family_has_its_places():
    assert PLACES.keys() == VISION_MODELS.keys() == grids.FAMILIES.keys()


@pytest.mark.parametrize("name", PLACES)
def test_a_forward_and_a_generation_know_the_places(name):
    model, inputs = vision(name)
    (found,) = run(model, inputs)
    assert places(found) == PLACES[name]
    assert found.length == inputs["input_ids"].shape[1]
    calls = generated(model, inputs)
    for _, m, (item,) in calls:
        assert item.length == m and places(item) == PLACES[name]
    assert [n for n, _, _ in calls] == [found.length, 1, 1]


@pytest.mark.parametrize("name", PLACES)
def test_chunks_know_what_came_before(name):
    model, inputs = vision(name)
    calls = generated(model, inputs, prefill_chunk_size=8)
    for _, m, (item,) in calls:
        cut = Modalities(99, tuple(Part(*place) for place in PLACES[name])).until(m)
        found = [part[:3] for part in places(item)]
        assert found == [part[:3] for part in places(cut)]
    assert places(calls[-1][2][0]) == PLACES[name]


@pytest.mark.parametrize("name", PLACES)
def test_prompts_of_text_alone_have_no_media(name):
    model, _ = vision(name)
    ids = torch.randint(5, 100, (2, 12))
    more = {"token_type_ids": torch.zeros_like(ids)} if name == "paligemma" else {}
    assert run(model, {"input_ids": ids, **more}) == (Modalities(12), Modalities(12))


def test_text_is_what_lies_between():
    model, inputs = vision("qwen3_vl")
    (found,) = run(model, inputs)
    assert [part.start for part in found.parts[1:]] == [part.stop for part in found.parts[:-1]]
    assert [part.kind for part in found.parts] == ["text", "video"] * 3 + ["text"]
    assert found.parts[0] == Part("text", 0, 9, (1, 1, 9)) and found.parts[-1].stop == 45
    assert {part.clip for part in found.media} == {0}, "one video, with times between its frames"
    assert Modalities(4).parts == (Part("text", 0, 4, (1, 1, 4)),)


def mixed(batch=1):
    """Qwen2.5-VL with two images of different sizes around a video, in that order in the tokens."""
    model, _ = vision("qwen2_5_vl")
    sizes = {IMAGE: [(1, 4, 4), (1, 6, 4)], VIDEO: [(2, 4, 6)]}
    ids = tokens(
        (None, 3), (START, 1), (IMAGE, 4), (None, 2), (START, 1), (VIDEO, 12), (None, 4),
        (START, 1), (IMAGE, 6), (None, 5),
    )  # fmt: skip
    inputs = {"input_ids": ids.repeat(batch, 1)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() + 2 * (
        inputs["input_ids"] == VIDEO
    ).int()
    for token, name, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        inputs[grid] = torch.tensor(sizes[token] * batch)
        inputs[name] = torch.randn(int(inputs[grid].prod(1).sum()), 3 * 2 * 4 * 4)
    inputs["second_per_grid_ts"] = torch.ones(batch)
    want = [("image", 4, 8, (1, 2, 2)), ("video", 11, 23, (2, 2, 3)), ("image", 28, 34, (1, 3, 2))]
    return model, inputs, want


@pytest.mark.parametrize("batch", [1, 2])
def test_images_and_videos_in_one_prompt(batch):
    model, inputs, want = mixed(batch)
    for found in (run(model, inputs), generated(model, inputs)[0][2]):
        assert [places(item) for item in found] == [want] * batch


def test_prompts_that_differ_in_one_batch():
    model, inputs, want = mixed(2)
    ids = inputs["input_ids"]
    ids[1] = torch.cat(
        [ids[1, 39 - 7 :], ids[1, : 39 - 7]]
    )  # the last image comes first, cut in two
    ids[1, :7] = torch.tensor([START, IMAGE, IMAGE, IMAGE, IMAGE, 7, 7])
    ids[1, 7:] = torch.tensor([7] * 3 + [VIDEO] * 12 + [7] * 2 + [IMAGE] * 6 + [7] * 9)
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    found = run(model, inputs)
    assert places(found[0]) == want
    assert places(found[1]) == [
        ("image", 1, 5, (1, 2, 2)), ("video", 10, 22, (2, 2, 3)), ("image", 24, 30, (1, 3, 2)),
    ]  # fmt: skip


def test_beams_share_the_grids_of_their_prompt():
    model, inputs, want = mixed()
    calls = generated(model, inputs, num_beams=3)
    assert [places(item) for item in calls[0][2]] == [want] * 3
    calls = generated(model, mixed(2)[1], num_beams=2)
    assert [places(item) for item in calls[0][2]] == [want] * 4


def test_left_padding_is_text():
    model, inputs, want = mixed()
    pad = torch.zeros(1, 5, dtype=torch.long)
    inputs["attention_mask"] = torch.cat([pad, torch.ones_like(inputs["input_ids"])], 1)
    for name in ("input_ids", "mm_token_type_ids"):
        inputs[name] = torch.cat([pad, inputs[name]], 1)
    (found,) = run(model, inputs)
    assert places(found) == [(kind, a + 5, b + 5, grid) for kind, a, b, grid in want]


def test_a_second_turn_goes_on_from_the_cache():
    model, inputs, want = mixed()
    watched = Watched(model)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        model(input_ids=torch.randint(5, 100, (1, 9)), past_key_values=cache)
        other = DynamicCache(config=model.config)
        model.model.language_model(
            inputs_embeds=torch.randn(1, 6, 64), past_key_values=other
        )  # behind the hooks' back
        model(input_ids=torch.randint(5, 100, (1, 9)), past_key_values=other)
    _, turn, _, unseen = watched.take()
    length = inputs["input_ids"].shape[1]
    assert turn[:2] == (9, length + 9) and places(turn[2][0]) == want
    assert unseen[2][0].unknown == BEFORE and not unseen[2][0].media


def test_a_cache_used_anew_forgets_the_prompt_before():
    model, inputs, want = mixed()
    cache = DynamicCache(config=model.config)
    watched = Watched(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.crop(36 - cache.get_seq_length())
        model(input_ids=torch.randint(5, 100, (1, 9)), past_key_values=cache)
        cache.crop(25 - cache.get_seq_length())
        model(input_ids=torch.randint(5, 100, (1, 9)), past_key_values=cache)
        cache.crop(-cache.get_seq_length())
        model(input_ids=torch.randint(5, 100, (1, 9)), past_key_values=cache)
    _, shorter, cut, anew = (call[2][0] for call in watched.take())
    assert places(shorter) == want and shorter.length == 45
    assert cut == Modalities(34, unknown=CROPPED)
    assert anew == Modalities(9)


def test_what_cannot_be_known_is_text_with_a_reason():
    model, inputs, _ = mixed()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    (found,) = run(model, {"inputs_embeds": embeds})
    assert found == Modalities(39, unknown=NO_IDS)
    short = dict(inputs, image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 6]]))
    (found,) = run(model, short)
    assert places(found)[2] == ("image", 28, 34, (1, 2, 3)), "it is what the tower was told"
    model.config.model_type = "a family of its own"
    (found,) = run(model, inputs)
    assert not found.media and "a family of its own lie isn't known" in found.unknown
    assert run(model, {"input_ids": torch.randint(5, 100, (1, 9))}) == (Modalities(9),)


def test_placeholders_go_by_two_names():
    for name in ("image_token_id", "image_token_index"):
        config = SimpleNamespace(**{name: 7}, model_type="another")
        media = Media.of(SimpleNamespace(config=config))
        media._before(None, (torch.tensor([[3, 7, 7, 4]]),), {})
        assert media.modalities(4, 1)[0].unknown.startswith("where images of another lie")
    assert Media.of(SimpleNamespace(config=SimpleNamespace(model_type="text"))) is None


def test_text_models_and_layers_with_a_sliding_cache_tell_nothing():
    model, inputs = text("llama")
    assert run(model, inputs) == ()
    model, inputs = vision("gemma3")
    calls = []

    def watch(call):
        calls.append((call.layer, call.k.shape[1], call.context.modalities))
        return call.stock()

    attachment = attach(model, watch)
    model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=8)
    attachment.detach()
    known = [(".0." in layer, bool(found)) for layer, _, found in calls]
    assert known == [(True, True), (False, True)] + [(True, False), (False, True)] * (
        len(known) // 2 - 1
    )


def test_copies_and_compiled_models():
    model, inputs, want = mixed()
    watched = Watched(model)
    twin = copy.deepcopy(model)
    watched.take()
    (seam, *_) = [
        vars(m)["_sparse_dit_seam"] for m in twin.modules() if "_sparse_dit_seam" in vars(m)
    ]
    with torch.no_grad():
        twin(**inputs)
    assert places(seam.tap.context.modalities[0]) == want
    assert pickle.loads(pickle.dumps(seam.tap.media)).config.model_type == "qwen2_5_vl"
    model, inputs = vision("paligemma")
    watched = Watched(model)
    ids = {"input_ids": torch.randint(5, 100, (1, 12))}
    ids["token_type_ids"] = torch.zeros_like(ids["input_ids"])
    with torch.no_grad():
        torch.compile(model, backend="eager")(**ids)
    assert watched.take()[0][2][0].unknown == COMPILED


def test_rows_with_line_breaks():
    """Pixtral's, as its processor writes them: [IMG_BREAK] behind each row, [IMG_END] behind the last."""
    model, inputs = vision("mistral3")
    row = [(IMAGE, 3), (12, 1)]
    inputs["input_ids"] = tokens(
        (None, 3), *row, (IMAGE, 3), (13, 1), (None, 4), *row, (IMAGE, 3), (13, 1), (None, 6)
    )
    inputs["pixel_values"] = torch.randn(2, 3, 32, 48)
    inputs["image_sizes"] = torch.tensor([[32, 48], [32, 48]])
    (found,) = run(model, inputs)
    assert places(found) == [("image", 3, 10, (1, 2, 3)), ("image", 15, 22, (1, 2, 3))]
    assert [(part.row_tokens, part.row_period, part.frame_period) for part in found.media] == [
        (1, 4, 8)
    ] * 2
    calls = generated(model, inputs, prefill_chunk_size=5)
    assert [places(item) for _, _, (item,) in calls[:2]] == [
        [("image", 3, 5, (1, 2, 3))], [("image", 3, 10, (1, 2, 3))],
    ]  # fmt: skip


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


@pytest.mark.parametrize(
    "size", [(30, 60), (20, 90), (64, 64), (96, 30), (50, 41), (500, 333), (7, 9)]
)
@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_tiles_of_any_resolution(name, size):
    """Grids from the number of placeholders, against what the host makes of an image of that size."""
    from transformers.models.llava_next_video import modeling_llava_next_video as host

    model, _ = vision(name)
    model.config.image_grid_pinpoints = PINPOINTS
    tiles = host.image_size_to_num_patches(torch.tensor(size), PINPOINTS, 32)
    with torch.no_grad():
        (features,) = model.model.get_image_features(
            torch.randn(1, tiles, 3, 32, 32), torch.tensor([size])
        ).pooler_output
    high, wide = host.get_anyres_image_grid_shape(size, PINPOINTS, 32)
    _, h, w = host.unpad_image(torch.zeros(1, high * 4, wide * 4), size).shape
    assert len(features) == 16 + h * (w + 1)
    kinds = torch.zeros(1, len(features) + 9, dtype=torch.uint8)
    kinds[0, 5 : 5 + len(features)] = 1
    ((small, large),) = grids.media_of(model.config, kinds, [(tiles, 0, 0)])
    assert small == Part("image", 5, 21, (1, 4, 4), 0, 0)
    assert large == Part("image", 21, 5 + len(features), (1, h, w), 1, 1)
    with pytest.raises(grids.Unfit, match="aren't known"):
        grids.media_of(model.config, kinds[:, : len(features) + 3], [(tiles, 0, 0)])


def test_an_image_that_may_have_been_shrunk_isnt_guessed():
    model, _ = vision("llava_onevision")
    kinds = torch.ones(1, 9 * 16 * 2, dtype=torch.uint8)
    kinds[0, -5:] = 0
    with pytest.raises(grids.Unfit, match="aren't known"):
        grids.media_of(model.config, kinds, [])
    kinds[0, 24:] = 0
    with pytest.raises(grids.Unfit, match="may be of 0 sizes"):
        grids.media_of(model.config, kinds, [])


def test_tiles_in_a_row_are_frames_of_one_size():
    model, _ = vision("internvl")
    kinds = torch.zeros(1, 40, dtype=torch.uint8)
    kinds[0, 3:15] = kinds[0, 20:24] = 1
    (found,) = grids.media_of(model.config, kinds, [])
    assert [(part.grid, part.stop - part.start) for part in found] == [
        ((3, 2, 2), 12),
        ((1, 2, 2), 4),
    ]


def test_placeholders_that_fit_no_grid_are_refused():
    model, _ = vision("qwen2_5_vl")
    kinds = torch.zeros(2, 30, dtype=torch.uint8)
    kinds[:, 3:9] = 2
    for told, why in (
        ([(2, 2, 5)], "aren't an image of 2 x 5"),
        ([], "fewer images than the prompt has"),
        ([(1, 2, 3)] * 3, "not all images of these prompts were read yet"),
        ([(3, 2, 3)], "the placeholders aren't 3 frames of 2 x 3"),
    ):
        kinds[:, 12:16] = 2 if "3 frames" in why else 0
        with pytest.raises(grids.Unfit, match=why):
            grids.media_of(model.config, kinds, told)
