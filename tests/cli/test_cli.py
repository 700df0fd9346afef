"""The command line as a person meets it: help, every bad input, exit codes, no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from sparse_dit import cli
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern
from sparse_dit.plan import Plan
from sparse_dit.search.device_table import DeviceTable
from sparse_dit.search.front import Front, Point
from tests.helpers.eval_cases import WINDOW, made_up_plan, uniform_plan
from tests.helpers.tiny_pipelines import wan

COMMAND = [sys.executable, "-m", "sparse_dit.cli"]
SIZE = ["--height", "64", "--width", "64", "--num-frames", "17", "--steps", "2", "--guidance", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, plans good and bad, prompt files."""
    folder = tmp_path_factory.mktemp("cli")
    pipe = wan()[0]
    pipe.save_pretrained(folder / "model")
    uniform_plan(pipe, WINDOW, TokenLayout.video(5, 4, 4)).save(folder / "plan.json")
    made_up_plan().save(folder / "other.json")
    text = (folder / "plan.json").read_text()
    (folder / "cut.json").write_text(text[: len(text) // 2])
    (folder / "hostile.json").write_text(text.replace('"density": 0.5', '"density": 1e400'))
    (folder / "prompts.txt").write_text("# animals\na cat\n\n  a dog \n")
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "nomodel").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "model_index.json").write_text("{")
    (folder / "taken").mkdir()
    (folder / "taken" / "report.json").write_text("precious")
    (folder / "taken.json").write_text("precious")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def one_line_error(code, stderr):
    assert code == 2, stderr
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and stderr.rstrip().endswith(errors[0]), stderr
    return errors[0]


BAD = {
    "unknown command": (["bogus"], "No such command"),
    "unknown option": (["show", "plan.json", "--bogus"], "No such option"),
    "missing argument": (["show"], "Missing argument"),
    "missing plan": (["show", "nowhere.json"], "no plan"),
    "truncated plan": (["show", "cut.json"], "not valid JSON"),
    "hostile plan": (["show", "hostile.json"], "finite"),
    "missing plan to compare": (["diff", "plan.json", "nowhere.json"], "no plan"),
    "no prompt": (["search", "model", *SIZE, "--min-psnr", "30"], "no prompt"),
    "empty prompt": (["search", "model", *SIZE, "--prompt", " "], "must not be empty"),
    "missing prompt file": (["search", "model", "--prompts", "no.txt"], "doesn't exist"),
    "empty prompt file": (["search", "model", "--prompts", "empty.txt"], "holds no prompt"),
    "binary prompt file": (["search", "model", "--prompts", "binary.txt"], "UTF-8"),
    "no size": (["search", "model", "--prompt", "a"], "give --height and --width"),
    "zero size": (["search", "model", "--prompt", "a", *SIZE, "--width", "0"], "width must be"),
    "bad number": (["search", "model", "--prompt", "a", "--steps", "many"], "steps"),
    "no dial": (["search", "model", "--prompt", "a", *SIZE], "give one of"),
    "two dials": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--max-error", "1"],
        "give one of",
    ),
    "negative dial": (
        ["search", "model", "--prompt", "a", *SIZE, "--max-error", "-1"],
        "--max-error must be",
    ),
    "infinite dial": (["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "inf"], "finite"),
    "more than equal": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "120"],
        "at most 100",
    ),
    "no such device table": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--cost-table", "nowhere"],
        "no device table 'nowhere'",
    ),
    "seconds without a table": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--dense-seconds", "9"],
        "--dense-seconds is for a device table: give --cost-table too",
    ),
    "plan for a table": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--cost-table", "cut.json"],
        "not valid JSON",
    ),
    "plan exists": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--out", "taken.json"],
        "--force",
    ),
    "plan without ending": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--out", "plan"],
        ".json",
    ),
    "one prompt, none held out": (
        ["search", "model", "--prompt", "a", *SIZE, "--min-psnr", "30", "--out", "x.json"],
        "held",
    ),
    "no model": (
        ["search", "nowhere", "--prompt", "a", *SIZE, "--min-psnr", "30", "--out", "x.json"],
        "no folder",
    ),
    "folder without model": (
        ["eval", "nomodel", "plan.json", "--prompt", "a", *SIZE],
        "model_index",
    ),
    "broken model": (["eval", "broken", "plan.json", "--prompt", "a", *SIZE], "can't be loaded"),
    "file for a model": (["eval", "plan.json", "plan.json", "--prompt", "a", *SIZE], "is a file"),
    "no such device": (
        ["eval", "model", "plan.json", "--prompt", "a", *SIZE, "--device", "warp"],
        "unknown device",
    ),
    "no such gpu": (
        ["eval", "model", "plan.json", "--prompt", "a", *SIZE, "--device", "cuda:99"],
        "no device",
    ),
    "no such dtype": (
        ["eval", "model", "plan.json", "--prompt", "a", *SIZE, "--dtype", "int8"],
        "dtype must be",
    ),
    "report exists": (
        ["eval", "model", "plan.json", "--prompt", "a", *SIZE, "--out", "taken"],
        "taken/report.json exists already: pass --force",
    ),
    "report is a file": (
        ["eval", "model", "plan.json", "--prompt", "a", *SIZE, "--out", "plan.json"],
        "is a file",
    ),
    "no cases in the plan": (["eval", "model", "plan.json", *SIZE], "no held-out prompts"),
    "plan of another model": (
        ["eval", "model", "other.json", "--prompt", "a", *SIZE],
        "for this model",
    ),
    "size that divides nothing": (
        ["eval", "model", "plan.json", "--prompt", "a", *SIZE, "--height", "63"],
        "multiple of 16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, here, capsys):
    arguments, message = BAD[name]
    before = sorted(here.rglob("*"))
    code = cli.run(arguments)
    assert message in one_line_error(code, capsys.readouterr().err)
    assert sorted(here.rglob("*")) == before  # nothing written, nothing lost
    assert (here / "taken.json").read_text() == "precious"


def test_a_process_fails_like_that_too(here):
    result = subprocess.run([*COMMAND, "show", "cut.json"], capture_output=True, text=True)
    one_line_error(result.returncode, result.stderr)
    assert result.stdout == ""


def test_debug_shows_the_traceback(here, capsys):
    assert cli.run(["show", "cut.json", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert cli.run(["--debug", "show", "cut.json"]) == 2


def test_a_bug_is_no_traceback_either(here, capsys, monkeypatch):
    def broken(name):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(Plan, "from_pretrained", broken)
    assert cli.run(["show", "plan.json"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: two lines (--debug shows where)\n"


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom sparse_dit import cli\nprint(cli.run(['--help']))\n"
        "print(sorted({'diffusers', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for command in (
        "demo",
        "plan",
        "search",
        "check",
        "stability",
        "show",
        "diff",
        "eval",
        "doctor",
    ):
        assert re.search(rf"│ {command} ", result.stdout)
    assert result.stdout.splitlines()[-2:] == ["0", "[]"]


@pytest.mark.parametrize(
    "command", ["demo", "plan", "search", "check", "stability", "show", "diff", "eval", "doctor"]
)
def test_every_command_has_help(command, capsys):
    assert cli.run([command, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_show(here, capsys):
    assert cli.run(["show", "plan.json", "--heads"]) == 0
    shown = capsys.readouterr().out
    assert "WanPipeline, density 0.500" in shown
    assert "blocks.1.attn1" in shown.replace("\n", "")
    assert "speedup 1.5" in shown


def test_show_says_what_backs_a_plan(here, capsys):
    plan = Plan.load("plan.json")
    ((name, part),) = plan.components.items()
    layer = next(iter(part.layers))
    marked = {name: {layer: [[0, 1]]}}
    again = {"spread": 0.04, "same": 0.97, "density": 0.002}
    backing = {"row_error": 0.05, "gap": 0.001, "prompt_dependent": marked, "repeated": again}
    measured = {"psnr_db": 33.0, "psnr_db_least": 31.94, "psnr_db_most": 34.0}
    replace(plan, provenance={"evidence": backing}, measured=measured).save("backed.json")
    assert cli.run(["show", "backed.json", "--heads"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "timings off by 4.0% each, 97% of the heads choose the same" in said
    assert "density differs by at most 0.0020" in said and "from 31.9 to 34.0 dB" in said
    assert "standard error 5.0%" in said and "lower by more than 0.10%" in said
    assert re.search(r"depend on the prompt: 1 of \d+ sparse heads", said)
    assert "1*" in said and "*: its best places depend on the prompt" in said
    odds = ([], {"prompt_dependent": {name: [1]}}, {"prompt_dependent": {name: {layer: [1]}}})
    for odd in (*odds, {"repeated": [1]}, {"repeated": {"same": "all"}}):
        replace(plan, provenance={"evidence": odd}).save("odd.json", overwrite=True)
        assert cli.run(["show", "odd.json", "--heads"]) == 0
    for file in ("backed.json", "odd.json"):
        (here / file).unlink()


def test_diff(here, capsys):
    assert cli.run(["diff", "plan.json", "plan.json"]) == 0
    assert "equal" in capsys.readouterr().out
    assert cli.run(["diff", "plan.json", "other.json"]) == 1
    assert "config_hash" in capsys.readouterr().out


def test_eval_writes_a_report(here, capsys, tmp_path):
    out = tmp_path / "new" / "out"
    arguments = ["eval", "model", "plan.json", "--prompts", "prompts.txt", *SIZE, "--out", str(out)]
    arguments += ["--max-sequence-length", "16", "--drawn-clips", "1"]
    assert cli.run(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "noise floor" in said.out and f"{out / 'report.html'}" in said.out
    assert "a dog" in said.err  # progress
    data = json.loads((out / "report.json").read_text())
    assert [case["case"]["prompt"] for case in data["cases"]] == ["a cat", "a dog"]
    assert len(data["teacher_forced"]) == 3
    assert isinstance(data["seam_overhead"], float)
    assert cli.run(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run([*arguments, "--force"]) == 0


def test_doctor_writes_what_it_found(tmp_path, capsys):
    from sparse_dit.attention import BACKENDS

    file = tmp_path / "doctor.json"
    assert cli.run(["doctor", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "torch:" in said and "gather" in said and "cpu" in said
    found = json.loads(file.read_text())
    assert found["version"] == 1 and "cpu" in found["devices"]
    assert found["environment"]["torch"] == version("torch") and "triton" in found["packages"]
    here = {row["backend"]: row for row in found["backends"] if row["device"] == "cpu"}
    assert set(here) == set(BACKENDS) - {"reference"}
    # each is judged: why it can't run, or how far off it is
    for row in here.values():
        assert row["problem"] is None and (row["absent"] is None) == (row["error"] is not None)
    row = here["gather"]
    assert 0 < row["error"] < 1e-4 and 0 < row["density"] < 1
    assert row["seconds"] > 0 and row["dense_seconds"] > 0
    assert here["triton"]["absent"] and here["triton"]["seconds"] is None
    assert cli.run(["doctor", "--json", str(file)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert cli.run(["doctor", "--json", str(tmp_path / "doctor.txt")]) == 2


def test_doctor_finds_a_broken_backend(capsys, monkeypatch):
    from sparse_dit import attention, doctor

    def wrong(*args):
        result = right(*args)
        return result._replace(out=result.out * 1.01)

    right = attention.BACKENDS["gather"].forward
    monkeypatch.setattr(attention.BACKENDS["gather"], "forward", wrong)
    monkeypatch.setattr(doctor, "BACKENDS", {"gather": attention.BACKENDS["gather"]})
    monkeypatch.setattr(doctor, "variant_checkups", lambda: [])  # all but this one take long
    assert cli.run(["doctor"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_an_interrupted_search_says_how_to_go_on(here, capsys, monkeypatch):
    import sparse_dit.search

    def interrupted(pipe, prompts, *, profile, **options):
        profile.write_text("half way")
        raise KeyboardInterrupt

    monkeypatch.setattr(sparse_dit.search, "search_plan", interrupted)
    arguments = ["search", "model", "--prompts", "prompts.txt", *SIZE, "--min-psnr", "30"]
    assert cli.run([*arguments, "--out", "new.json"]) == 130
    assert "goes on from new.profile.safetensors" in capsys.readouterr().err
    assert not (here / "new.json").exists()
    (here / "new.profile.safetensors").unlink()


def test_a_missed_goal_is_written_and_told(here, capsys, monkeypatch):
    import sparse_dit.search

    def missed(pipe, prompts, **options):
        assert options["profile_steps"] == 7
        plan = Plan.load("plan.json")
        measured = {"psnr_db": 21.04, "speedup": 1.4, "met": False}
        plan = replace(plan, measured=measured, provenance={"objective": {"min_psnr": 30.0}})
        dense = Point(speedup=1.0, density=1.0, error=0.0, seconds=1.0, patterns=[0], errors=[0.0])
        front = Front("0" * 64, 1.0, (Pattern(Dense()),), (dense,))
        return SimpleNamespace(plan=plan, front=front)

    monkeypatch.setattr(sparse_dit.search, "search_plan", missed)
    arguments = ["search", "model", "--prompts", "prompts.txt", *SIZE, "--min-psnr", "30"]
    arguments += ["--profile-steps", "7"]
    assert cli.run([*arguments, "--out", "new.json"]) == 1
    said = capsys.readouterr().err
    assert "not met: 30 dB were asked for" in said and "21.0 dB" in said
    assert Plan.load("new.json").measured["met"] is False
    assert (here / "new.front.json").exists()
    for file in ("new.json", "new.front.json", "new.profile.safetensors"):
        (here / file).unlink(missing_ok=True)


def test_a_plan_is_not_lost_to_another_process(here, capsys, monkeypatch):
    import sparse_dit.search

    dense = Point(speedup=1.0, density=1.0, error=0.0, seconds=1.0, patterns=[0], errors=[0.0])
    front = Front("0" * 64, 1.0, (Pattern(Dense()),), (dense,))

    def found(pipe, prompts, **options):
        (here / "mine.json").write_text("another's")
        return SimpleNamespace(plan=Plan.load("plan.json"), front=front)

    monkeypatch.setattr(sparse_dit.search, "search_plan", found)
    arguments = ["search", "model", "--prompts", "prompts.txt", *SIZE, "--min-psnr", "30"]
    assert cli.run([*arguments, "--out", "mine.json"]) == 3
    said = capsys.readouterr()
    assert "mine.json can't be written (it exists by now): the result is in mine-2.json" in said.err
    assert "wrote mine-2.json and mine-2.front.json" in said.out
    assert Plan.load("mine-2.json") == Plan.load("plan.json")
    assert (here / "mine.json").read_text() == "another's"
    for file in ("mine.json", "mine-2.json", "mine-2.front.json"):
        (here / file).unlink()


def test_ctrl_c_stops_a_process_at_once():
    process = subprocess.Popen(
        [*COMMAND, "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # in the background of a shell the tests would hand on that it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "stopped\n"


def test_bench_cost_writes_a_table(here, capsys, tmp_path):
    file = tmp_path / "new" / "table.json"
    arguments = ["bench", "cost", "--tokens", "2x8x8,64", "--head-dim", "8", "--out", str(file)]
    arguments += ["--density", "0.3", "--density", "0.1", "--heads", "1", "--threads", "1"]
    assert cli.run(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "SDPA" in said.out and "128 tokens, head_dim 8" in said.err
    data = json.loads(file.read_text())
    assert data["entries"][0]["grid"] == [2, 8, 8]
    assert data["threads"] == 1 and data["name"].endswith("-1-thread")
    assert all(entry["dense"] > 0 and entry["permute"] > 0 for entry in data["entries"])
    assert DeviceTable.load(file).at(TokenLayout.video(2, 8, 8), 8, "float32").source
    assert cli.run(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "many"], "tokens must be"),
        (["--tokens", "64,,64"], "tokens must be"),
        (["--density", "1.5"], "between 0 and 1"),
        (["--dtype", "int8"], "dtype must be"),
        (["--head-dim", "5000"], "1 to 1024"),
        (["--device", "warp"], "unknown device"),
        (["--backend", "warp", "--tokens", "64"], "unknown backend"),
        (["--out", "table.txt"], ".json"),
        (["--out", "taken.json"], "--force"),
    ],
)
def test_bench_cost_says_what_is_wrong(options, message, here, capsys):
    before = sorted(here.rglob("*"))
    code = cli.run(["bench", "cost", *options])
    assert message in one_line_error(code, capsys.readouterr().err)
    assert sorted(here.rglob("*")) == before
