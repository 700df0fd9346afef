"""Profiles of several processes: merged, they are the profile of one; one process writes at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparse_dit.cli import app, run
from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.search import search_plan
from sparse_dit.search.profile_file import only_writer, read_profile, write_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.shares import merge_profiles, profile_share

SETTINGS = GenerationSettings(64, 64, 7, steps=4, guidance=3.0, max_sequence_length=32)
PROMPTS = (
    "a red circle moves left over gray stripes",
    "a yellow triangle moves left over purple checks",
    "a blue square moves up over gray gradient",
    "a green circle moves right over red stripes",
)
CASES = tuple(Case(text, seed) for seed, text in enumerate(PROMPTS))
ROWS = 8


@pytest.fixture(scope="module")
def whole(short_pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "profile.safetensors"
    profile_pipeline(short_pipe, CASES, SETTINGS, rows=ROWS, path=path)
    return path


def _assert_equal(a, b):
    assert a.done == b.done and a.settings == b.settings and a.rows == b.rows
    for name, part in a.components.items():
        other = b.components[name]
        assert (part.sigmas, part.layers) == (other.sigmas, other.layers)
        close = {"rtol": 1e-4, "atol": 1e-6}
        for key, found in part.found.items():
            assert [*map(list, part.candidates(*key))] == [*map(list, other.candidates(*key))]
            torch.testing.assert_close(found, other.found[key], **close)
        torch.testing.assert_close(part.beyond, other.beyond, **close)
        torch.testing.assert_close(part.looks, other.looks, **close)
        assert part.scores.keys() == other.scores.keys()
        for key, scores in part.scores.items():
            torch.testing.assert_close(scores, other.scores[key], **close)
        torch.testing.assert_close(part.pictures, other.pictures, **close)


class _Waiting(Exception):
    pass


def _stop():
    raise _Waiting


def _command(model, path, *more):
    sizes = ["--height", "64", "--width", "64", "--num-frames", "7", "--steps", "4"]
    rest = ["--guidance", "3", "--max-sequence-length", "32", "--rows", str(ROWS)]
    return ["profile", model, "--out", str(path), *sizes, *rest, *more]


def _prompts(folder):
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return ["--prompts", str(file)]


def test_two_processes_give_the_profile_of_one(whole, tmp_path, short_model, capfd):
    path = tmp_path / "profile.safetensors"
    command = _command(short_model, path, *_prompts(tmp_path), "--workers", "2")
    code, said = run(command), capfd.readouterr().err
    assert code == 0, said
    assert {f"process {n} of 2" in said for n in (1, 2)} == {True}
    _assert_equal(read_profile(path), read_profile(whole))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "profile.safetensors",
        "prompts.txt",
    ]


def test_torchrun_gives_the_profile_of_one(whole, tmp_path, short_model):
    several = tmp_path / "several.safetensors"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = _command(short_model, several, *_prompts(tmp_path))
    ran = subprocess.run(
        [sys.executable, *launch, "-m", "sparse_dit", *command],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    _assert_equal(read_profile(several), read_profile(whole))


def test_a_stopped_profile_goes_on_from_the_runs_that_are_there(short_pipe, whole, tmp_path):
    path = tmp_path / "profile.safetensors"
    with pytest.raises(_Waiting):
        profile_share(short_pipe, CASES, SETTINGS, path, rank=0, world=2, barrier=_stop, rows=ROWS)
    first = list(tmp_path.glob("*.parts/find-*"))
    assert len(first) == 1
    written = first[0].stat().st_mtime_ns
    said = []
    profile_share(
        short_pipe, CASES, SETTINGS, path, rank=0, world=1, barrier=lambda: None, rows=ROWS,
        report=said.append,
    )  # fmt: skip
    kinds = [text.split(", ")[1].split(":")[0] for text in said]
    assert kinds == ["find", "beyond", "score", "score"]
    assert written and not any(f"find: {CASES[0].prompt}" in text for text in said)
    _assert_equal(read_profile(path), read_profile(whole))


@pytest.mark.parametrize("done", [1, 3])
def test_processes_go_on_from_the_profile_of_one(short_pipe, whole, tmp_path, done):
    path = tmp_path / "profile.safetensors"
    runs = iter(range(done))

    def report(number, total, text):
        if next(runs, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_pipeline(short_pipe, CASES, SETTINGS, rows=ROWS, path=path, report=report)
    assert len(read_profile(path).done) == done
    share = {"rank": 0, "world": 1, "barrier": lambda: None, "rows": ROWS}
    profile_share(short_pipe, CASES, SETTINGS, path, **share)
    _assert_equal(read_profile(path), read_profile(whole))
    assert read_profile(path).seconds > 0


def test_a_search_goes_on_from_a_profile_of_the_command(short_pipe, tmp_path, short_model):
    path = tmp_path / "profile.safetensors"
    assert run(_command(short_model, path, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])) == 0
    said = []
    search_plan(
        short_pipe, CASES[:2], held_out=CASES[2:3], settings=SETTINGS, rows=ROWS, max_error=0.5,
        profile=path, report=said.append,
    )  # fmt: skip
    assert [text for text in said if text.startswith("profile ")] == ["profile 3/3 profiled"]


def test_files_that_do_not_fit_are_not_merged(short_pipe, whole, tmp_path):
    def refused(reason, other):
        path = tmp_path / "other.safetensors"
        write_profile(other, path)
        with pytest.raises(ValueError, match=reason) as error:
            merge_profiles([whole, path])
        assert "\n" not in str(error.value)

    refused("both hold the run 'score", read_profile(whole))
    other = read_profile(whole)
    other.rows += 1
    refused("another number of rows", other)
    other = read_profile(whole)
    other.done[0] += " elsewhere"
    refused("scores are of other candidates", other)
    other = read_profile(whole)
    other.components["transformer"].config_hash = "0" * 64
    refused("another model", other)
    other = read_profile(whole)
    other.components["transformer"].sigmas[0] += 0.01
    refused("other noise levels", other)
    with pytest.raises(ValueError, match="at least one profile file"):
        merge_profiles([])


def test_two_searches_cannot_write_one_profile(short_pipe, tmp_path, short_model):
    path = tmp_path / "profile.safetensors"
    code = (
        "import sys, time\nfrom sparse_dit.search.profile_file import only_writer\n"
        f"with only_writer({str(path)!r}):\n    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is writing the profile") as error:
            profile_pipeline(short_pipe, CASES[:1], SETTINGS, rows=ROWS, path=path)
        assert "\n" not in str(error.value) and not path.exists()
        assert run(_command(short_model, path, "--prompt", PROMPTS[0])) == 2
        other.kill()
    with only_writer(path):  # a killed process leaves nothing locked
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_whole_profile_is_read_by_any_number_of_searches(short_pipe, whole):
    with only_writer(whole):
        said = []
        profile_pipeline(
            short_pipe,
            CASES,
            SETTINGS,
            rows=ROWS,
            path=whole,
            report=lambda *text: said.append(text),
        )
    assert said == [(5, 5, "profiled")]


def test_under_torchrun_processes_are_not_started(tmp_path, monkeypatch, short_model):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(
        app, _command(short_model, tmp_path / "p.safetensors", "--prompt", "x", "--workers", "2")
    )
    assert isinstance(result.exception, ValueError)
    assert "leave out --workers" in str(result.exception)
    assert not list(Path(tmp_path).iterdir())
