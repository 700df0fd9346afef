"""Every command of the README and the other documents, as a person types it, so that none can rot.

A command is run, smaller (`shortened.py`); or the program that it is for reads it, as on the pages of
measurements, whose commands take long; or it is listed with why neither is done. What can't be run as it
stands, a fault in the document, fails here.
"""

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest

from sparse_dit import cli, doctor
from sparse_dit.bench import flex, quick
from sparse_dit.demo import run as demo
from sparse_dit.layout import TokenLayout
from sparse_dit.search.device_table import DeviceTable
from tests.bench.test_bench import attend_in_blocks
from tests.helpers.documents import ROOT, Shown, commands, pages, prose, words_of
from tests.helpers.search_cases import stub_costs
from tests.helpers.shortened import CODES, NOT_READ, READ, WORDS, among, filled, shorter
from tests.helpers.tiny_language_models import save_language_model
from tests.helpers.tiny_pipelines import wan
from tests.helpers.typed import (
    USAGE,
    arguments,
    command_names,
    known_options,
    lacks,
    program_file,
    read,
    read_by_program,
    run_program,
    without_ellipses,
)

GIVEN = ("lora.safetensors", "language-model", "book.txt", "other.txt")
PROMPTS = "a cat plays the piano\na dog runs\na boat at dawn\n"
MAP = "docs/reference/files.md"
FOREIGN = {"--nproc-per-node", "--inplace"}  # options of torchrun and setuptools


class Desk:
    """Where the commands are typed: a folder for each page, with what the page takes for granted."""

    def __init__(self, folder: Path):
        """Nothing has been typed yet."""
        self.folder, self.ran = folder, {}
        pipe = wan()[0]
        pipe.save_pretrained(folder / "model")
        pipe.transformer.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        )
        layers = peft.get_peft_model_state_dict(pipe.transformer)
        name = "lora.safetensors"
        pipe.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=name)
        save_language_model(folder)

    def at(self, page: str) -> Path:
        """The folder of a page."""
        folder = self.folder / page.replace("/", "-")
        if not folder.exists():
            folder.mkdir()
            (folder / "model").symlink_to(self.folder / "model")
            for name in GIVEN:
                (folder / name).symlink_to(self.folder / name)
            (folder / "prompts.txt").write_text(PROMPTS)
        return folder

    def run(self, shown: Shown, monkeypatch, capsys) -> None:
        """Run a command of `sparse-dit`, smaller; what ran on an earlier page isn't run again."""
        typed = shorter(shown.words[1:])
        folder, (names, given) = self.at(shown.page), read(typed)
        if "plan.json" in map(str, given.values()) and given.get("plan_file") is None:
            self.provide_plan(folder, monkeypatch, capsys)
        key = repr((names, sorted(given.items())))
        if key not in self.ran:
            before = set(folder.iterdir())
            monkeypatch.chdir(folder)
            with arguments(["sparse-dit", *typed]):
                code = cli.run(typed)
            said = capsys.readouterr()
            assert code in CODES.get(names, (0,)), f"{shown}\n{typed}\n{said.err}"
            self.ran[key] = set(folder.iterdir()) - before
        for path in self.ran[key]:
            there = folder / path.name
            if not there.exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, there)

    def provide_plan(self, folder: Path, monkeypatch, capsys) -> None:
        """A page that doesn't show how its plan is made has the README's."""
        if not (folder / "plan.json").exists():
            (search,) = (c for c in commands("README.md") if " search " in c.text and c.whole)
            self.run(search, monkeypatch, capsys)
            for name in ("plan.json", "plan.front.json"):
                shutil.copy(self.at("README.md") / name, folder / name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, short_model):
    """All that takes long made short: sizes that no option sets, prices, compilers."""
    with pytest.MonkeyPatch.context() as patched:
        stub_costs(patched)
        small = replace(demo.SETTINGS, height=32, width=32, num_frames=5, steps=1)
        patched.setattr(demo, "QUICK", small)
        patched.setattr(demo, "shipped", lambda name: short_model)
        patched.setattr(demo, "DRAWN_CLIPS", 1)
        patched.setattr(doctor, "TIMED", TokenLayout.video(4, 8, 8))
        patched.setattr(quick, "TOKENS", TokenLayout.video(2, 16, 16))
        patched.setattr(quick, "DIAGONAL_TOKENS", TokenLayout.video(4, 6, 10))
        patched.setattr(quick, "HEAD_DIMS", (16,))
        patched.setattr(quick, "SECONDS", 0.1)
        patched.setattr(flex, "compiled", lambda threads: attend_in_blocks)
        yield Desk(tmp_path_factory.mktemp("documents"))


def check(shown: Shown) -> bool:
    """Whether a command is one to run.

    Raises:
        AssertionError, ValueError: It is wrong.
    """
    try:
        return _check(shown)
    except USAGE as error:
        raise AssertionError(f"{shown}: {error.format_message()}") from error


def _check(shown: Shown) -> bool:
    if among(NOT_READ, shown):
        _look_up(shown)
        return False
    words = without_ellipses(filled(shown.words))
    first, *rest = itertools.dropwhile(lambda word: re.match("[A-Z_]+=", word), words)
    if first == "torchrun":
        assert "sparse_dit" in rest
        lacks(rest[rest.index("sparse_dit") + 1 :])
    elif first == "pytest" or rest[:2] == ["-m", "pytest"]:
        files = [word for word in rest if word not in ("-m", "pytest")]
        assert all((ROOT / word).exists() for word in files), shown
        return False
    elif first in ("python", "python3"):
        program_file(rest)
        read_by_program(rest)
    elif lacks(rest):
        assert not shown.whole, f"{shown} lacks {lacks(rest)}"
        return False
    return not (among(READ, shown) or rest != filled(shown.words[1:]))


def _look_up(shown: Shown) -> None:
    """What is neither run nor read must at least be there."""
    words = shown.words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert words[1] in targets, f"{shown}: the Makefile has {targets}"
    elif words[0] == "python":
        program_file(words[1:])
    elif "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file(), shown


@pytest.mark.parametrize("page", [page for page in pages() if commands(page)])
def test_every_command_runs_as_it_is_shown(page, desk, monkeypatch, capsys):
    for shown in commands(page):
        if not check(shown) or page.startswith("docs/measurements/"):
            continue
        if shown.words[0].startswith("python"):
            run_program([*shown.words[1:], "--out", str(desk.at(page) / "made")])
        else:
            desk.run(shown, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparse-dit serch model", "No such command"),
        ("sparse-dit search model --wide", "No such option"),
        ("sparse-dit bench kernel --quick --sizes 9", "No such option"),
        ("sparse-dit search ... --steps many", "'--steps': Input should be a valid integer"),
        ("sparse-dit plan model --density 0.4 0.5", "unexpected extra argument"),
        ("sparse-dit eval model", "lacks"),
        ("torchrun --nproc-per-node 8 -m sparse_dit profile ... --shared", "No such option"),
        ("python -m benchmarks.gpu --fast", "unrecognized arguments: --fast"),
        ("python -m benchmarks.gpus --json gpu.json", "there is no benchmarks/gpus.py"),
        ("python search/ltx_video_2b_geometry.py --merge", "unrecognized arguments"),
        ("make tests", "the Makefile has"),
        ("pytest tests/test_nothing.py", "test_nothing"),
        ("A=1 python -m pytest tests/test_nothing.py", "test_nothing"),
    ],
)
def test_a_wrong_command_is_found(text, words):
    with pytest.raises((ValueError, AssertionError), match=words):
        check(Shown("a page", text, whole=True))


def test_options_that_sentences_name_exist():
    known = known_options() | FOREIGN
    assert "--min-psnr" in known and "--no-flex" in known and "--cpu-seconds" in known
    wrong = {page: named - known for page in pages() if (named := options_in(prose(page))) - known}
    assert not wrong
    for page in pages():
        for device in re.findall(r"--cost-table ([\w-]+)(?!\S*\.json)", prose(page)):
            DeviceTable.load(device)
    assert options_in("with `--wide`, a dash -- and x--y") == {"--wide"}


def options_in(text: str) -> set[str]:
    """Options by name."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_what_is_said_of_commands_here_is_of_some():
    every = [shown for page in pages() for shown in commands(page)]
    texts = {shown.text for shown in every}
    assert {"sparse-dit show plan.json", "sparse-dit doctor", "make demo"} <= texts
    assert (
        "TRITON_INTERPRET=1 python -m pytest tests/gpu_without_gpu/triton_interpreted.py" in texts
    )
    for table in (READ, NOT_READ):
        unused = [start for start in table if not any(among({start: ""}, one) for one in every)]
        assert not unused
        for file in re.findall(r"tests/[\w/]+\.py", " ".join(table.values())):
            assert (ROOT / file).is_file(), f"{file} is said to test a command"
    assert WORDS.keys() <= {word for shown in every for word in shown.words}


def test_links_lead_to_a_file_and_to_a_heading_in_it():
    for page in pages():
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", words_of(page)):
            there = (ROOT / page).parent.joinpath(target) if target else ROOT / page
            assert there.exists(), f"{page}: {target}"
            assert not heading or heading in headings(there), f"{page}: {target}#{heading}"


def headings(page: Path) -> set[str]:
    """What a link to a heading of a page may name, as GitHub makes it of the heading's words."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}


def test_pages_are_short_enough_for_ten_minutes():
    """Figures go to docs/measurements/, what is looked up goes to docs/reference/."""
    most = {"README.md": 900, "docs/design.md": 900}
    how_tos = [page for page in pages() if re.fullmatch(r"docs/[\w-]+\.md", page)]
    assert len(how_tos) > 10
    words = {page: len(words_of(page).split()) for page in ["README.md", *how_tos]}
    assert {page: n for page, n in words.items() if n >= most.get(page, 600)} == {}


def test_the_map_of_the_house_names_what_is_there():
    there = {ROOT / path for path in mapped(words_of(MAP))}
    assert all(path.exists() for path in there), [path for path in there if not path.exists()]
    package = ROOT / "sparse_dit"
    parts = {file.parent for file in package.glob("*/__init__.py")} | set(package.glob("*.py"))
    small = {package / f"{name}.py" for name in ("__init__", "__main__", "version")}
    assert parts - small <= there, f"not in the map: {sorted(parts - small - there)}"


def test_the_map_of_the_house_names_every_command():
    (named,) = re.findall(r"cli/ +sparse-dit ([a-z| \n]+?);", words_of(MAP))
    assert sorted(re.findall(r"\w+", named)) == sorted(command_names())


def mapped(page: str) -> list[str]:
    """Paths in the map of the house: the first column, folders by their indentation."""
    found, within = [], {}
    for line in page.split("\n"):
        if not (match := re.match(r"( {4}| {6})(\S+(?:, \S+)*)(?:  +|$)", line)):
            continue
        depth = len(match[1])
        for name in match[2].split(", "):
            path = within.get(4, "") * (depth > 4) + name
            found.append(path)
            if name.endswith("/"):
                within[depth] = path
    return found
