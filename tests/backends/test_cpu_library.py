"""The shared library of the CPU kernel: found, opened, missed, and how its threads are torch's own."""

import logging
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sparse_dit import attention, doctor
from sparse_dit.attention import attend, backend_name, sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.backends.cpu.packed import packed_index
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window

LAYOUT = TokenLayout.video(2, 6, 8, text_after=3)
PATTERNS = [Pattern(Window(0, 1, 1), (1, 2, 2), far=True), Pattern(Dense()), Pattern(Skip())]

needs_library = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))


def call(dtype=torch.float32, layout=LAYOUT):
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(PATTERNS), layout.seq_len, 16)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v, build_index(PATTERNS, layout)


def python(code, **environment):
    """Run code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As after an installation without a compiler."""
    found, problem = library.load(tmp_path / library.FILE.name)
    monkeypatch.setattr(library, "LIBRARY", found)
    monkeypatch.setattr(library, "PROBLEM", problem)
    monkeypatch.setattr(attention, "_said", set())


def test_without_the_library_gather_runs_and_says_so_once(no_library, caplog):
    q, k, v, index = call()
    want = sparse_attention(q, k, v, index, backend="gather")
    with caplog.at_level(logging.WARNING, logger="sparse_dit"):
        assert torch.equal(sparse_attention(q, k, v, index), want)
        assert backend_name(q, index) == "gather"
        sparse_attention(q, k, v, index)
    (record,) = caplog.records
    assert "not built" in record.message and "C++ compiler" in record.message
    assert "slower backend 'gather'" in record.message


def test_without_the_library_the_named_backend_raises(no_library):
    q, k, v, index = call()
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run this: .* is not built"):
        sparse_attention(q, k, v, index, backend="cpu")
    with pytest.raises(NotImplementedError, match="is not built"):
        torch.ops.sparse_dit.attend(q, k, v, packed_index(index), None, None, 0.25)


def test_float64_goes_to_gather_without_a_warning(caplog):
    q, k, v, index = call(torch.float64)
    assert backend_name(q, index) == "gather"
    assert not caplog.records
    with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and float16, but q is"):
        sparse_attention(q, k, v, index, backend="cpu")


@pytest.mark.parametrize("dim", [4, 12, 520])
def test_head_dims_that_it_lacks(dim):
    _, _, _, index = call()
    q = torch.zeros(1, 3, LAYOUT.seq_len, dim)
    assert backend_name(q, index) == "gather"
    with pytest.raises(NotImplementedError, match=f"multiple of 8 up to 512, got {dim}"):
        backend_name(q, index, "cpu")


def test_a_library_that_is_none_is_a_problem_and_no_crash(tmp_path):
    file = tmp_path / library.FILE.name
    file.write_text("not a library")
    found, problem = library.load(file)
    assert found is None and "can't be used" in problem


def test_a_library_of_another_version_is_refused(monkeypatch):
    if library.LIBRARY is None:
        pytest.skip(library.PROBLEM)
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    found, problem = library.load()
    assert found is None and "has interface" in problem and "reinstall" in problem


def test_python_and_the_header_say_the_same():
    header = (library.FILE.parent / "csrc" / "abi.h").read_text()
    assert f"ABI_VERSION = {library.ABI_VERSION};" in header
    statuses = header.split("enum Status")[1].split("{")[1].split("}")[0].split(",")
    names = [status.split("=")[0].strip() for status in statuses if status.strip()]
    assert names.index("NO_MEMORY") == library.NO_MEMORY
    for struct_name, said, pack, extra in (
        ("Problem", library.PROBLEM_FIELDS, library.PACK_PROBLEM, 4 * 3 + 2 * 1),
        ("SumsProblem", library.SUMS_FIELDS, library.PACK_SUMS, 2 * 3),
        ("ChoiceProblem", library.CHOICE_FIELDS, library.PACK_CHOICE, 0),
        ("RunsProblem", library.RUNS_FIELDS, library.PACK_RUNS, 0),
        ("MeansProblem", library.MEANS_FIELDS, library.PACK_MEANS, 3),
        ("BlocksProblem", library.BLOCKS_FIELDS, library.PACK_BLOCKS, 0),
    ):
        fields = fields_of(header, struct_name)
        assert fields == said.split()
        words = len(fields) + extra  # strides are of 4 words, those of bounds of 2
        assert len(pack(*[0] * words)) == 8 * words == struct.calcsize(f"{words}q")


def fields_of(header, name):
    """Names of a struct's fields."""
    body = header.split(f"struct {name} {{")[1].split("};")[0]
    body = "".join(line.partition("//")[0] for line in body.splitlines()).replace("*", " ")
    types = ("const", "void", "float", "int32", "int64", "uint8", "double")
    return [
        word
        for declaration in body.split(";")
        for word in declaration.replace(",", " ").split()
        if word.removesuffix("_t") not in types and not word.endswith("Strides")
    ]


@needs_library
def test_the_environment_chooses_a_variant(monkeypatch):
    for name in library.LIBRARY.runnable:
        monkeypatch.setenv(library.VARIANT_VARIABLE, name)
        assert library.load()[0].running == name
    code = "import sparse_dit.backends.cpu.library"
    done = python(code, **{library.VARIANT_VARIABLE: "mmx"})
    assert done.returncode and "no variant 'mmx'" in done.stderr
    assert "one of " + ", ".join(library.LIBRARY.runnable) in done.stderr


@needs_library
def test_every_library_has_the_portable_variant():
    assert library.LIBRARY.variants[-1] == "portable"
    assert library.LIBRARY.runnable[-1] == "portable"
    assert library.LIBRARY.running in library.LIBRARY.runnable


@needs_library
def test_multiply_adds_of_every_variant_are_counted():
    opened = library.Library(library.FILE)
    for name in opened.runnable:
        opened.use_variant(name)
        one = opened.multiply_adds(1)
        assert one >= 2 * 4 * 12 and opened.multiply_adds(1000) == 1000 * one


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is loaded")
def test_one_openmp_library_is_loaded():
    code = """
import torch
from tests.backends.test_cpu_library import call, library
from sparse_dit import sparse_attention
torch.set_num_threads(2)
sparse_attention(*call(), backend="cpu")
maps = open("/proc/self/maps").read().split()
names = {m for m in maps if m.rpartition("/")[2].startswith(("libgomp", "libomp", "libiomp"))}
print(len(names), library.LIBRARY.shares_pool, torch.__config__.parallel_info().count("OpenMP"))
"""
    done = python(code, PYTHONPATH=str(Path(__file__).parents[2]))
    assert not done.returncode, done.stderr
    count, shares, openmp = done.stdout.split()
    assert int(count) <= 1
    assert shares == "True" or openmp == "0"


@needs_library
def test_calls_from_several_threads_at_once():
    layouts = [TokenLayout.video(2, 4 + i, 6, text_after=i) for i in range(4)]
    calls = [call(layout=layout) for layout in layouts]
    truth = [attend(*c, backend="cpu", return_lse=True) for c in calls]
    wrong = []

    def work(place):
        for i in range(50):
            which = (place + i) % len(calls)
            got = attend(*calls[which], backend="cpu", return_lse=True)
            same = torch.equal(got.out, truth[which].out) and torch.equal(got.lse, truth[which].lse)
            if not same:
                wrong.append(which)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


@needs_library
def test_a_call_lets_other_threads_run():
    q, k, v, index = call(layout=TokenLayout.video(4, 32, 32))

    def ran_meanwhile():
        go, done, seen = threading.Event(), threading.Event(), []
        other = threading.Thread(target=lambda: (go.wait(), seen.append(not done.is_set())))
        other.start()
        go.set()
        sparse_attention(q, k, v, index, backend="cpu")
        done.set()
        other.join()
        return seen[0]

    assert any(ran_meanwhile() for _ in range(20))  # a busy machine may not start it in time


def test_doctor_tells_of_every_variant(monkeypatch):
    monkeypatch.setattr(doctor, "_seconds", lambda run, device: 1.0)
    found = {check.name: check for check in doctor.variant_checkups()}
    if library.LIBRARY is None:
        assert not found
        return
    assert tuple(found) == doctor.VARIANTS
    assert set(library.LIBRARY.variants) <= set(found)
    assert [name for name, check in found.items() if check.used] == [library.LIBRARY.running]
    for name, check in found.items():
        if name in library.LIBRARY.runnable:
            assert check.checkup.problem is None and check.checkup.error < 1e-5
        else:
            assert check.checkup is None and "not" in check.untested


def test_doctor_without_the_library_is_not_ill(no_library):
    assert doctor.variant_checkups() == []
    check = doctor.check_backend("cpu", "cpu", timed=False)
    assert check.problem is None and "is not built" in check.absent
