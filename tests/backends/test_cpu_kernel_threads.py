"""The native CPU kernel on several threads: the same result, whoever computes what."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_dit.attention import attend, block_mass
from sparse_dit.backends.cpu import library
from sparse_dit.index import SparseIndex, build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from tests.helpers.kernel_cases import DTYPES, dense, in_order, one_head, qkv, until

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def mixed_index(**keywords):
    layout = TokenLayout.video(5, 10, 12, text_before=20)
    patterns = [
        Pattern(Window(0, 2, 2), (2, 4, 4), far=True),
        Pattern(Dense()),
        Pattern(Skip()),
        Pattern(Window(1, 1, None), (None, 2, 2), cell=3, far=True, sink_frames=1),
    ]
    return build_index(patterns, layout, **keywords)


def same(ours, want):
    return all(
        (x is None and y is None) or torch.equal(x, y) for x, y in zip(ours, want, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_thread_counts_make_no_difference(variant, threads, dtype, causal):
    """Bit for bit; the mass of a dense group is summed from several tasks."""
    index = in_order(mixed_index()) if causal else mixed_index()
    inputs = qkv(index, 32, batch=2, kv_heads=2, dtype=dtype)
    keywords = {"row_stop": until(index, 620, 377), "backend": "cpu"}
    threads(1)
    want = attend(*inputs, index, return_lse=True, mass_block=16, **keywords)
    mass = block_mass(*inputs[:2], index, want.lse, mass_block=16, **keywords)
    for count in (1, 2, 3, 4, 7):
        threads(count)
        for _ in range(3):
            assert same(attend(*inputs, index, return_lse=True, mass_block=16, **keywords), want)
            again = block_mass(*inputs[:2], index, want.lse, mass_block=16, **keywords)
            assert torch.equal(again, mass)


def test_what_is_returned_makes_no_difference(variant):
    index = mixed_index()
    for dtype in DTYPES:
        inputs = qkv(index, 32, dtype=dtype)
        want = attend(*inputs, index, backend="cpu").out
        assert torch.equal(attend(*inputs, index, backend="cpu", return_lse=True).out, want)


def test_one_head_alone_is_the_same(variant):
    """What other heads and batch items there are makes no difference."""
    index = mixed_index()
    q, k, v = qkv(index, 32, batch=2)
    want = attend(q, k, v, index, backend="cpu").out
    for head in range(4):
        alone = SparseIndex((index.entries[index.head_to_pattern[head]],), (0,))
        inputs = [x[1:, head : head + 1] for x in (q, k, v)]
        assert torch.equal(attend(*inputs, alone, backend="cpu").out, want[1:, head : head + 1])


def test_several_python_threads_at_once(variant, threads):
    """Different problems at the same time, each on two threads, in a pool that is shared."""
    threads(2)
    index = mixed_index()
    problems = [qkv(index, 32, seed=i, dtype=DTYPES[i % 3]) for i in range(6)]
    keywords = {"backend": "cpu", "return_lse": True, "mass_block": 32}
    want = [attend(*inputs, index, **keywords) for inputs in problems]
    start = threading.Barrier(4)

    def work(worker):
        torch.set_num_threads(2)  # which OpenMP keeps for each thread
        start.wait()
        order = [(worker + i) % len(problems) for i in range(2 * len(problems))]
        return all(same(attend(*problems[i], index, **keywords), want[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_an_index_is_packed_once_for_all_threads():
    """The first calls on an index come at the same time."""
    start = threading.Barrier(4)

    def work(index, inputs):
        start.wait()
        return attend(*inputs, index, backend="cpu").out

    with ThreadPoolExecutor(4) as pool:
        for seed in range(10):
            index = mixed_index()
            inputs = qkv(index, 8, seed=seed)
            outs = list(pool.map(work, [index] * 4, [inputs] * 4))
            assert all(torch.equal(out, outs[0]) for out in outs)


def test_python_goes_on_meanwhile(threads):
    """The kernel holds no lock of the interpreter: another thread runs while it computes."""
    threads(1)
    index = one_head(dense(4096, 4096), 4)
    inputs = qkv(index, 64)
    attend(*inputs, index, backend="cpu")
    done, ticks = threading.Event(), []

    def count():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    ticker = threading.Thread(target=count)
    ticker.start()
    start = time.perf_counter()
    attend(*inputs, index, backend="cpu")
    stop = time.perf_counter()
    done.set()
    ticker.join()
    sys.setswitchinterval(before)
    inside = [t for t in ticks if start + 0.1 * (stop - start) < t < stop - 0.1 * (stop - start)]
    assert len(inside) >= 3, f"{len(inside)} ticks in {stop - start:.2f} s"
