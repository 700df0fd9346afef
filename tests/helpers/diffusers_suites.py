"""diffusers' own tests of the supported models, without and with a dense plan patched in.

    python -m tests.helpers.diffusers_suites CHECKOUT [--only NAME ...] [--json FILE] [--stand-ins]

CHECKOUT is a checkout of https://github.com/huggingface/diffusers, best at the tag of the installed
version: its tests run, the installed library is what they test. Nothing is copied from it. Every
file of tests/models/transformers, tests/pipelines and tests/lora that names a supported transformer
runs twice, each time in a pytest of its own. The second time `diffusers_suites_plugin` patches each
supported transformer with a dense plan when it is built. What comes out differently, test by test,
is printed, and the exit code is 1 then; 2 if there is nothing to run.

Tests marked slow, or that need an accelerator, are skipped by diffusers itself. There is no network
(HF_HUB_OFFLINE=1): what needs a download that isn't in the cache fails both times and is counted as
that. Most tests of pipelines do; with `--stand-ins` they find made-up text encoders and tokenizers
(`diffusers_suites_hub`), and only numbers that they expect of the real ones are wrong, both times.
A test that fails both times must say the same, down to the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import sparse_dit
from sparse_dit.tables import out
from tests.helpers.diffusers_suites_hub import write_stand_ins
from tests.helpers.diffusers_suites_plugin import DENSE, OUTCOMES

PROGRESS = Console(stderr=True)
FOLDERS = ("tests/models/transformers", "tests/pipelines", "tests/lora")
# words by which a failure is told for what it is; the last ones of missing optional packages
LACKS = {
    "needs a download": (
        "couldn't connect to", "outgoing traffic has been disabled", "disk cache", "offline mode",
    ),
    "expects other numbers": ("Tensors not close", "xpected slice", "not less than", "Expected: ["),
    "lacks a package": (
        "ModuleNotFoundError", "No module named", "requires the", "library but it was not found",
        "name 'ftfy' is not defined", "name 'transforms' is not defined",
    ),
}  # fmt: skip
FAILED = ("failed", "error")
# what differs between two runs of one test: addresses, temporary folders
ADDRESS = re.compile(rf"0x[0-9a-f]+|{re.escape(tempfile.gettempdir())}\S*")

# tests that can't hold with the patch, by a regular expression of their names, and why
EXCEPTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Run:
    """Where the tests are, how long one file may take in seconds, the hub's cache if not the user's."""

    checkout: Path
    timeout: float = 900
    cache: Path | None = None


@dataclass(frozen=True)
class Difference:
    """A test that came out differently; `because` if that is one of `EXCEPTIONS`."""

    test: str
    without: str
    patched: str
    message: str
    because: str | None


@dataclass(frozen=True)
class FileResult:
    """One test file, run twice.

    Attributes:
        file: Path within the checkout.
        without, patched: Number of tests by outcome.
        models: Transformers that were patched.
        calls: Attention calls that went through the patch, by the reason that they ran dense.
        failures: What the tests said that failed both times, in one line.
        differences: Tests that came out differently.
    """

    file: str
    without: dict[str, int]
    patched: dict[str, int]
    models: int
    calls: dict[str, int]
    failures: dict[str, str]
    differences: list[Difference] = field(default_factory=list)

    @property
    def unexplained(self) -> list[Difference]:
        """Differences that are none of `EXCEPTIONS`."""
        return [d for d in self.differences if d.because is None]


def suite_files(checkout: Path, only: list[str]) -> list[Path]:
    """Test files of a checkout that name a supported transformer, and one of `only` in their path."""
    names = [
        m.transformer for m in sparse_dit.supported_models() if m.of_diffusers and m.reason is None
    ]
    named = re.compile(rf"\b(?:{'|'.join(names)})\b")
    found = (p for folder in FOLDERS for p in sorted((checkout / folder).rglob("test_*.py")))
    return [
        path
        for path in found
        if (not only or any(name in path.relative_to(checkout).as_posix() for name in only))
        and named.search(path.read_text())
    ]


def run_file(run: Run, file: Path) -> FileResult:
    """Run a test file without and with the patch; a run that dies or takes too long is one error."""
    stock, patched = (_pytest(run, file, dense) for dense in (False, True))
    before, after = stock["tests"], patched["tests"]
    both = {name for name in before.keys() & after.keys() if _same(before[name], after[name])}
    failed = {n: _line(before[n][1]) for n in sorted(both) if before[n][0] in FAILED}
    nothing = ("not run", "")
    return FileResult(
        file.relative_to(run.checkout).as_posix(),
        _counted(outcome for outcome, _ in before.values()),
        _counted(outcome for outcome, _ in after.values()),
        patched["patched"],
        patched["calls"],
        failed,
        [
            _difference(name, before.get(name, nothing), after.get(name, nothing))
            for name in sorted((before.keys() | after.keys()) - both)
        ],
    )


def _pytest(run: Run, file: Path, dense: bool) -> dict[str, Any]:
    """What the plugin wrote in one run of pytest."""
    roots = [str(Path(__file__).parent), str(Path(sparse_dit.__file__).parents[1])]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        changed = {OUTCOMES: str(outcomes), DENSE: str(int(dense)), "HF_HUB_OFFLINE": "1"}
        changed |= {"HF_HUB_CACHE": str(run.cache)} if run.cache else {}
        paths = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "diffusers_suites_plugin",
            "-p", "no:cacheprovider", "--rootdir", str(run.checkout), str(file),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=run.checkout, capture_output=True, text=True, timeout=run.timeout,
                env={**os.environ, **changed, "PYTHONPATH": paths},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return _broken(file, f"took longer than {run.timeout:g} s; allow more by --timeout")
        if not outcomes.exists():
            return _broken(file, f"pytest ended with {done.returncode}: {done.stderr[-3000:]}")
        return json.loads(outcomes.read_text())


def _broken(file: Path, message: str) -> dict[str, Any]:
    """Of a run that told nothing: the file as one test."""
    return {"tests": {file.name: ("error", message)}, "patched": 0, "calls": {}}


def _same(before: tuple[str, str], after: tuple[str, str]) -> bool:
    """Whether a test came out the same; one that failed must say the same, too."""
    if before[0] != after[0] or before[0] not in FAILED:
        return before[0] == after[0]
    return ADDRESS.sub("", before[1]) == ADDRESS.sub("", after[1])


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(Counter(words))  # dataclasses.asdict can't copy a Counter


def _line(message: str) -> str:
    return " ".join(message.split())[:300]


def _lack(message: str) -> str:
    found = (kind for kind, words in LACKS.items() if any(word in message for word in words))
    return next(found, "other")


def _difference(test: str, before: tuple[str, str], after: tuple[str, str]) -> Difference:
    because = next((why for name, why in EXCEPTIONS.items() if re.search(name, test)), None)
    return Difference(test, before[0], after[0], after[1] or before[1], because)


def show(results: list[FileResult]) -> None:
    """Both runs of each file as a table, their sum, and every difference below it."""
    table = Table(
        "file", "passed", "with patch", "differ", "excepted", "fail both", "skipped", "models",
        "calls", show_footer=True,
    )  # fmt: skip
    rows = [_row(r) for r in results]
    for r, row in zip(results, rows, strict=True):
        table.add_row(r.file.removeprefix("tests/").removesuffix(".py"), *map(str, row))
    sums = (f"{len(results)} files", *(str(sum(column)) for column in zip(*rows, strict=True)))
    for column, total in zip(table.columns, sums, strict=True):
        column.footer, column.overflow = total, "fold"
    out.print(table)
    lacking = Counter(_lack(message) for r in results for message in r.failures.values())
    if lacking:
        words = ", ".join(f"{number} {what}" for what, number in lacking.most_common())
        out.print(f"failed both times, and said the same: {words}", highlight=False)
    for d in (d for r in results for d in r.differences):
        out.print(f"{d.test}: {d.without} without, {d.patched} with", markup=False)
        out.print(f"    [dim]{escape(d.because or _line(d.message))}[/dim]", soft_wrap=True)


def _row(r: FileResult) -> tuple[int, ...]:
    excepted = len(r.differences) - len(r.unexplained)
    return (
        r.without.get("passed", 0), r.patched.get("passed", 0), len(r.unexplained), excepted,
        len(r.failures), r.without.get("skipped", 0), r.models, sum(r.calls.values()),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the suites; 1 if anything that isn't excepted differs, 2 if there is nothing to run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.diffusers_suites", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkout", type=Path, help="checkout of diffusers")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the wanted files' paths")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run of a file")
    parser.add_argument("--stand-ins", action="store_true", help="made-up models for downloads")
    given = parser.parse_args(argv)
    checkout = given.checkout.resolve()
    if not (files := suite_files(checkout, given.only)):
        print(f"{checkout} has no test file of a supported model, or none fits --only",
              file=sys.stderr)  # fmt: skip
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if given.stand_ins:
            disable_progress_bar()
            write_stand_ins(Path(folder))
        run = Run(checkout, given.timeout, Path(folder) if given.stand_ins else None)
        results = [run_file(run, file) for file in track(files, "running", console=PROGRESS)]
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    show(results)
    return int(any(r.unexplained for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
