"""What the Triton kernels compile to for GPUs that aren't here; see `triton_aot.py`."""

import pytest

pytest.importorskip("triton", reason="triton isn't installed")

from sparse_dit.backends.triton import kernel, lay
from sparse_dit.backends.triton.config import CONFIGS, Config
from tests.gpu_without_gpu import triton_aot
from tests.gpu_without_gpu.triton_aot import FULL, RECORD, TARGETS, Case, compiled, within_bars


@pytest.mark.parametrize("case", list(triton_aot.tested()), ids=str)
def test_compiled_kernel(case):
    """No spills, tensor cores, wide asynchronous loads, and no more instructions than recorded."""
    built = compiled(case)
    assert built.faults(case) == []
    assert within_bars(case, built, RECORD)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_more_stages_fetch_further_ahead(target):
    """Shared memory grows by a step's keys and values with each stage."""
    shared = [compiled(Case(target, 64, Config(128, 64, 8, n))).shared for n in (2, 3, 4)]
    step = 2 * 64 * 64 * 2
    assert shared[1] - shared[0] >= step and shared[2] - shared[1] >= step


def test_faults_are_found():
    """A tile that is known to be too large spills, and its stages don't fit sm_120."""
    case = Case("sm_120", 128, Config(128, 64, 8, 4), FULL)
    found = compiled(case).faults(case)
    assert any("spills" in x for x in found) and any("shared memory" in x for x in found)


def test_every_architecture_is_compiled_for():
    assert {name for name, *_ in TARGETS.values()} == set(CONFIGS)


@pytest.mark.parametrize("function", [kernel.attend, kernel.pool, kernel.mass, lay.lay], ids=str)
def test_no_number_is_specialised(function):
    """So another resolution or number of frames compiles nothing anew."""
    free = [p.name for p in function.params if not p.is_constexpr and not p.do_not_specialize]
    assert set(free) <= {*triton_aot.POINTERS, *triton_aot.TENSORS, *lay.POINTERS, "Valid", "scale"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("block_n", [32, 128])
def test_tables_are_written_out_of_registers(target, block_n):
    """`ptxas` puts one or two numbers aside on some targets, but no array of them."""
    assert triton_aot.spilled_by_lay(target, block_n) <= 16


def test_registers_that_nothing_is_written_to_are_found():
    """The fault of `ptxas` that made head_dim 96 wrong on an H200, where channels are two unequal pieces."""
    case = Case("sm_90", 96, Config(64, 64, 4, 3))
    assert any("may not be written" in x for x in compiled(case).faults(case))
    whole = Case("sm_90", 96, Config(64, 64, 4, 3, whole=True))
    assert compiled(whole).faults(whole) == []
