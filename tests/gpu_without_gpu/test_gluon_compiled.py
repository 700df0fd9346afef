"""What the Gluon kernel compiles to for a GPU that isn't here; see `gluon_aot.py`."""

import pytest

pytest.importorskip("triton.experimental.gluon", reason="triton isn't installed, or has no Gluon")

from sparse_dit.backends.gluon import kernel
from sparse_dit.backends.gluon.config import Config
from tests.gpu_without_gpu import gluon_aot
from tests.gpu_without_gpu.gluon_aot import RECORD, Case, compiled
from tests.gpu_without_gpu.triton_aot import within_bars


@pytest.mark.parametrize("case", list(gluon_aot.tested()), ids=str)
def test_compiled_kernel(case):
    """No spills, TMA, a product in flight in every round, room for its blocks, no more instructions."""
    built = compiled(case)
    assert built.faults(case) == []
    assert within_bars(case, built, RECORD)


def test_faults_are_found():
    """A configuration that is known to spill, with more stages than fit."""
    case = Case(128, Config(2, 128, 4, 168), 2, True)
    found = compiled(case).faults(case)
    assert any("spills" in x for x in found) and any("shared memory" in x for x in found)


def test_no_number_is_specialised():
    """So another resolution or number of frames compiles nothing anew."""
    free = [p.name for p in kernel.attend.params if not p.is_constexpr and not p.do_not_specialize]
    blocks = {"QueryBlocks", "KeyBlocks", "ValueBlocks", "PooledBlocks"}
    assert set(free) <= {*gluon_aot.POINTERS, *blocks, "Out", "scale"}
