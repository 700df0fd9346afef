"""One dense generation for profiling and tuning, and played-back beginnings: the same, but cheaper."""

import copy

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.index import seen_cells
from sparse_dit.integrations import workload
from sparse_dit.integrations.diffusers import attachment_of, self_attention_layers
from sparse_dit.layout import TokenLayout, tile_order
from sparse_dit.patterns import Pattern, Stencil
from sparse_dit.plan import PlanError
from sparse_dit.search import engine, search_plan, sensitivity
from sparse_dit.search.candidates import tilings
from sparse_dit.search.cells import cell_table
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.profile_file import read_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.seen import seen_tiles
from sparse_dit.search.sensitivity import recording, replaying
from sparse_dit.search.solve import stages_of
from tests.helpers import tiny_pipelines
from tests.helpers.cases import LAYOUTS

SETTINGS = GenerationSettings(64, 64, 17, steps=8, guidance=3.0, max_sequence_length=16)
SHORT = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
CASES = (Case("a cat plays the piano", 0), Case("a dog runs along the shore", 5))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.wan()[0]


def _search(pipe, **options):
    return search_plan(
        pipe,
        CASES,
        **{"settings": SETTINGS, "rows": 8, "max_error": 0.4, "tune_on": "calibration", **options},
    )


def test_tuning_on_calibration_makes_no_dense_generation_of_its_own(pipe, monkeypatch, tmp_path):
    def forbidden(*args):
        raise AssertionError("a dense generation too many")

    monkeypatch.setattr(engine, "dense_reference", forbidden)
    path = tmp_path / "kept.safetensors"
    searched = _search(pipe, profile=path)
    (reference,) = searched.references
    stock, _ = workload(pipe, SETTINGS).run(CASES[1])
    assert reference.case == CASES[1] and np.array_equal(reference.output, stock)
    assert len(reference.forwards["transformer"]) == 2 * SETTINGS.steps
    assert 0 < reference.seconds < searched.seconds["profile"]
    plan = searched.plan
    assert plan.measured["held_out_cases"] == 0 and plan.provenance["cases"]["held_out"] == []
    assert plan.provenance["cases"]["calibration"][1] == {"prompt": CASES[1].prompt, "seed": 5}
    said = []
    again = _search(pipe, profile=path, report=said.append)  # nothing is generated densely
    assert [text for text in said if text.startswith("profile ")] == ["profile 3/3 profiled"]
    assert again.problem.error.equal(searched.problem.error)
    assert np.array_equal(again.references[0].output, stock)
    with pytest.raises(ValueError, match="another list of prompts"):
        _search(pipe, profile=path, tune_on="held_out", held_out=["a red circle"])
    path.write_bytes(path.read_bytes().replace(b"reference|video", b"reference|vodeo"))
    with pytest.raises(PlanError, match="damaged"):
        read_profile(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tune_on": "test"}, r"tune_on must be one of .*'calibration'.*, got 'test'"),
        ({"held_out": ["a red circle"]}, "takes no held_out prompts"),
    ],
    ids=str,
)
def test_bad_options_are_refused(pipe, options, text):
    with pytest.raises(ValueError, match=text) as error:
        _search(pipe, **options)
    assert "\n" not in str(error.value)


def test_rows_of_a_whole_generation_are_spread_over_steps_and_halves_of_guidance(pipe):
    part = profile_pipeline(pipe, CASES, SHORT, rows=8, reference_steps=8).components["transformer"]
    levels = {level for level, _ in part.scores}
    assert levels == set(range(len(part.sigmas))) and len(levels) == 4
    rows = [part.scores[level, part.layers[0]]["rows"] for level in range(4)]
    assert sum(r[0].item() for r in rows) == 8 * 4  # 8 of 16 forwards, 4 rows each
    assert all((r > 0).all() for r in rows)


def test_a_noise_level_without_a_scored_forward_is_forgotten():
    part = ComponentProfile("Model", "0" * 64, {"a": (1, 8)}, sigmas=[1.0, 0.6, 0.1], layers=["a"])
    part.found = {(level, "a"): [level] for level in range(3)}
    part.scores = {(level, "a"): {"rows": level} for level in (0, 2)}
    part.drop_unscored()
    assert part.sigmas == [1.0, 0.1]
    assert part.found == {(0, "a"): [0], (1, "a"): [2]}
    assert part.scores == {(0, "a"): {"rows": 0}, (1, "a"): {"rows": 2}}


def test_playback_gives_the_same_video_and_leaves_the_transformer_as_it_was(pipe):
    transformer, case = pipe.transformer, CASES[0]
    workload(pipe, SHORT).run(
        case
    )  # the first run leaves what diffusers itself keeps in a transformer
    before = dict(vars(transformer))
    ran = []

    def watch(call):
        ran.append(call.context.step)
        return call.stock()

    with recording(pipe) as record:
        clean, _ = workload(pipe, SHORT).run(case)
    assert [sigma for _, sigma, _ in record] == sorted((s for _, s, _ in record), reverse=True)
    assert len(record) == 8
    for count in (0, 3, 8):
        ran.clear()
        with replaying(transformer, [output for _, _, output in record[:count]], watch):
            video, _ = workload(pipe, SHORT).run(case)
        assert np.array_equal(video, clean)
        assert min(ran, default=4) == count // 2  # guidance: two forwards a step
    with pytest.raises(KeyboardInterrupt), replaying(transformer, [], watch):
        raise KeyboardInterrupt
    assert attachment_of(transformer) is None
    assert dict(vars(transformer)) == before


def test_sensitivity_with_playback_is_that_of_whole_runs(pipe, monkeypatch):
    stages = stages_of([1.0, 0.8, 0.3])
    layers = list(self_attention_layers(pipe.transformer))
    options = (workload(pipe, SHORT), "transformer", stages, layers, CASES[0])
    ours = sensitivity.sensitivity(*options)

    def whole(transformer, outputs, intercept, pipe):
        return replaying(transformer, [], intercept, pipe)

    monkeypatch.setattr(sensitivity, "replaying", whole)
    assert sensitivity.sensitivity(*options) == ours
    assert len(ours.layers) == len(layers) and sum(ours.layers) == pytest.approx(1)


@pytest.mark.parametrize("embedded", [False, True])
def test_layers_are_probed_without_guidance_that_computes_twice(monkeypatch, embedded):
    """A model that takes guidance as an input keeps it."""
    probed, prober = [], sensitivity._prober
    pipe = tiny_pipelines.wan()[0]
    pipe.transformer.register_to_config(guidance_embeds=embedded)

    def noted(work, component, case, clean):
        probed.append((work.settings.guidance, len(clean.forwards) > work.settings.steps))
        return prober(work, component, case, clean)

    monkeypatch.setattr(sensitivity, "_prober", noted)
    layers = list(self_attention_layers(pipe.transformer))
    sensitivity.sensitivity(
        workload(pipe, SHORT), "transformer", stages_of([1.0, 0.4]), layers, CASES[0]
    )
    assert probed == [(3.0, True), (3.0, True) if embedded else (1.0, False)]


def test_a_layer_that_moves_nothing_has_no_share(pipe):
    layers = list(self_attention_layers(pipe.transformer))
    deaf = copy.deepcopy(pipe.transformer)
    silent = deaf.get_submodule(layers[0]).to_out[0]
    with torch.no_grad():
        silent.weight.zero_()
    whole = WanPipeline(**{**pipe.components, "transformer": deaf})
    found = sensitivity.sensitivity(
        workload(whole, SHORT), "transformer", stages_of([1.0, 0.4]), layers, CASES[0]
    )
    assert found.layers[0] == 0 and min(found.layers[1:]) > 0


def test_layers_are_probed_in_groups_of_neighbours():
    names = [f"blocks.{n}" for n in range(30)]
    groups = sensitivity._groups(names)
    assert [name for group in groups for name in group] == names
    assert len(groups) == sensitivity.LAYER_GROUPS and max(map(len, groups)) == 4
    shares = sensitivity._shares([(names[:2], 3.0), (names[2:3], None), (names[3:4], 1.0)])
    assert shares == [0.375, 0.375, 0, 0.25]
    assert sensitivity._shares([(names[:4], 0.0)]) == [0.25] * 4


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.num_grid], ids=str)
def test_seen_tiles_of_stencils_are_those_of_the_index(layout):
    generator = torch.Generator().manual_seed(0)
    for tile in (*tilings(layout), (1, 2, 3)):
        reach = cell_table(layout, tile).counts
        for count in (0, 1, 9):
            offsets = torch.randint(-4, 5, (count, 3), generator=generator)
            shape = Stencil.from_offsets(offsets)
            for sink in (0, 1):
                pattern = Pattern(shape, tile, sink_frames=sink)
                expected = seen_cells(pattern, tile_order(layout, tile))
                assert seen_tiles(pattern, layout).equal(expected), (pattern, reach)


def test_a_stencil_of_endless_runs_takes_no_memory():
    layout = TokenLayout.video(4, 8, 8)
    pattern = Pattern(Stencil(((0, 0, -1000, 2000),)), (1, 4, 4))
    assert seen_tiles(pattern, layout).equal(seen_cells(pattern, tile_order(layout, (1, 4, 4))))


def test_stencils_from_offsets_in_any_order():
    offsets = torch.tensor([[0, 0, 1], [1, -1, 0], [0, 0, 0], [0, 0, 3], [0, 1, 4], [-1, 0, -2]])
    expected = ((-1, 0, -2, 1), (0, 0, 0, 2), (0, 0, 3, 1), (0, 1, 4, 1), (1, -1, 0, 1))
    assert Stencil.from_offsets(offsets).offsets == expected
    assert Stencil.from_offsets(offsets[:0]).offsets == ()
