"""What can't be done is told before weights are read, all at once, in the words that were typed."""

from typing import Any

import pytest

from sparse_dit import cli, inputs
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import components, heads_of, self_attention_layers
from sparse_dit.integrations.loading import outline
from sparse_dit.integrations.pipeline import call_arguments
from sparse_dit.layout import TokenLayout
from sparse_dit.plan import config_hash
from sparse_dit.search.profile_file import write_profile
from sparse_dit.search.profiling import profile_pipeline
from tests.helpers.eval_cases import WINDOW, made_up_plan, uniform_plan
from tests.helpers.tiny_pipelines import BUILDERS, wan
from tests.helpers.tiny_video_pipelines import allegro_pipeline, mochi_pipeline

SIZE = ["--height", "64", "--width", "64", "--num-frames", "17", "--steps", "2", "--guidance", "1"]
SEARCH = ["search", "model", *SIZE, "--min-psnr", "30", "--prompt", "a", "--held-out", "b"]
PROFILE = ["profile", "model", *SIZE, "--prompt", "a"]
CHECK = ["check", "model", "window.json", *SIZE, "--prompt", "a"]
EVAL = ["eval", "model", "window.json", *SIZE, "--prompt", "a"]
STABILITY = ["stability", "model", *SIZE]
FRONTIER = ["eval", "frontier", "--json", "rows.json"]
RULE = (
    "for this model --height and --width must each be a multiple of 16, and --num-frames 4 k + 1 "
    "(others are rounded to it); got --height 63, --width 72, --num-frames 17: try --height 64, --width 64"
)
ODD = ["--height", "63", "--width", "72"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    pipe = wan()[0]
    pipe.save_pretrained(folder / "model")
    uniform_plan(pipe, WINDOW, TokenLayout.video(5, 4, 4)).save(folder / "window.json")
    made_up_plan().save(folder / "other.json")
    (folder / "file").write_text("precious")
    (folder / "left.safetensors").write_text("precious")
    (folder / "folder.json").mkdir()
    (folder / "list").mkdir()
    (folder / "list" / "model_index.json").write_text("[]")
    small = GenerationSettings(64, 64, 5, steps=2, guidance=1.0)
    write_profile(profile_pipeline(pipe, [Case("z")], small), folder / "other.safetensors")
    return folder


TOLD = {
    "the whole rule of sizes": (SEARCH + ODD, RULE),
    "of profiling": (PROFILE + ODD, RULE),
    "of checking": (CHECK + ODD, RULE),
    "of measuring": (EVAL + ODD, RULE),
    "of stability": (STABILITY + ODD, RULE),
    "of comparing": (
        [*FRONTIER, "--height", "63"],
        "multiple of 16, and --num-frames 2 k + 1; got",
    ),
    "of another size": ([*EVAL, "--sizes", "72x64x17"], "each be a multiple of 16"),
    "frames": ([*FRONTIER, "--num-frames", "16"], "try --height 192, --width 192, --num-frames 17"),
    "huge": ([*SEARCH, "--height", "160000"], "--height must be at most 65,536, got 160,000"),
    "more levels than a plan holds": (
        [*SEARCH, "--steps", "1000"],
        "--profile-steps must be at most",
    ),
    "seed": ([*SEARCH, "--seed", str(1 << 64)], "a seed must be a whole number >= 0"),
    "a prompt twice": (
        ["search", "model", *SIZE, "--min-psnr", "30", "--prompt", "a", "--prompt", "a"],
        "the last prompt is held out, so it must not be given twice, got 'a'",
    ),
    "one prompt": (
        ["search", "model", *SIZE, "--min-psnr", "30", "--prompt", "a"],
        "give --held-out prompts, or two or more prompts",
    ),
    "held-out and not": ([*SEARCH, "--held-out", "a"], "must not be calibration prompts"),
    "tensors left": ([*SEARCH, "--out", "left.json"], "--out: left.safetensors exists already"),
    "no place": ([*SEARCH, "--out", "/proc/x.json"], "--out: /proc/x.json can't be written"),
    "no place to profile": (
        [*SEARCH, "--profile", "/proc/x"],
        "--profile: /proc/x can't be written",
    ),
    "another's profile": (
        [*SEARCH, "--profile", "other.safetensors"],
        "is the profile of another size, steps or guidance and list of prompts",
    ),
    "another's profile, to go on with": (
        [*PROFILE, "--out", "other.safetensors"],
        "is the profile of another size, steps or guidance and list of prompts",
    ),
    "no profile": ([*SEARCH, "--profile", "file"], "file: damaged, or no profile"),
    "no profile to write": ([*PROFILE, "--out", "/proc/x"], "--out: /proc/x can't be written"),
    "table of another dtype": (
        [*SEARCH, "--cost-table", "h100", "--dense-seconds", "9"],
        "must have head_dim 24 float32",
    ),
    "plan of another model to check": (
        ["check", "model", "other.json", *SIZE, "--prompt", "a"],
        "number of heads must be",
    ),
    "plan of another model": (
        ["eval", "model", "other.json", *SIZE, "--prompt", "a"],
        "number of heads must be",
    ),
    "report in a file": ([*EVAL, "--out", "file"], "--out: file is a file: give a folder"),
    "report nowhere": ([*EVAL, "--out", "/proc/x"], "--out: /proc/x/report.html can't be written"),
    "endless video": ([*EVAL, "--fps", "inf"], "--fps must be a finite number > 0"),
    "no rows": (["eval", "frontier", "--json", "file"], "file is no frontier file"),
    "no picture": ([*FRONTIER, "--plot", "x.txt"], "--plot must name a file that ends in .png or"),
    "no stability": ([*STABILITY, "--json", "file"], "file is no stability file"),
    "prompts that aren't there": ([*STABILITY, "--count", "99999"], "--count must be at most"),
    "demo in a file": (["demo", "--out", "file"], "--out: file is a file: give a folder"),
    "point in no plan": (
        ["show", "window.json", "--pick", "psnr=30", "--out", "folder.json"],
        "--out: folder.json is a folder",
    ),
    "picture nowhere": (
        ["show", "window.json", "--front", "--picture", "/proc/x.png"],
        "--picture: /proc/x.png can't be written",
    ),
    "times nowhere": (["bench", "kernel", "--json", "/proc/x.json"], "--json: /proc/x.json can't"),
    "table nowhere": (["bench", "cost", "--out", "/proc/x.json"], "--out: /proc/x.json can't be"),
    "doctor nowhere": (["doctor", "--json", "/proc/x.json"], "--json: /proc/x.json can't be"),
    "store nowhere": (
        ["serve", "model", "--store", "/proc/x"],
        "--store: /proc/x/jobs.sqlite can't be written",
    ),
    "files nowhere": (
        ["serve", "model", "--store", "sqlite://", "--files", "/proc/x"],
        "--files: /proc/x/result can't be written",
    ),
    "no pipeline": (["search", "list", *SEARCH[2:]], "must hold a JSON object, got list"),
}


@pytest.mark.parametrize("case", TOLD)
def test_before_anything_is_loaded(case, folder, monkeypatch, capsys):
    def loaded(*arguments):
        raise AssertionError("weights are read")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(inputs, "load_pipeline", loaded)
    before = sorted(folder.rglob("*"))
    arguments, words = TOLD[case]
    code = cli.run(arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    assert words in said.splitlines()[-1], said
    assert "profiling" not in said and "Errno" not in said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", BUILDERS)
def test_an_outline_is_the_pipeline_without_weights(name, tmp_path):
    pipe = BUILDERS[name]()[0]
    pipe.save_pretrained(tmp_path)
    bare = outline(str(tmp_path))
    assert type(bare) is type(pipe)
    for part, module in components(pipe).items():
        drawn: Any = components(bare)[part]
        config: Any = module.config
        assert all(p.is_meta for p in drawn.parameters())
        assert config_hash(drawn.config) == config_hash(config)
        assert heads_of(drawn) == heads_of(module)
        assert list(self_attention_layers(drawn)) == list(self_attention_layers(module))
    scales = [name for name in dir(pipe) if name.startswith("vae_")]
    assert [getattr(bare, n, None) for n in scales] == [getattr(pipe, n, None) for n in scales]


def test_a_pipeline_that_diffusers_does_not_know_has_no_outline(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "OwnPipeline"}')
    assert outline(str(tmp_path)) is None


@pytest.mark.parametrize("build", [mochi_pipeline, allegro_pipeline, BUILDERS["cogvideox"]])
def test_sizes_that_fail_deep_inside_a_model_are_told(build):
    """The pipelines' own checks take multiples of 8, their patches are 2 x 2 of the latents."""
    pipe = build()[0]
    fits = GenerationSettings(64, 80, 9)
    assert call_arguments(pipe, Case("a"), fits)["width"] == 80
    with pytest.raises(
        ValueError, match=r"height and width must each be a multiple of 16.*width 72"
    ):
        call_arguments(pipe, Case("a"), GenerationSettings(64, 72, 9))
