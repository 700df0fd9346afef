"""What the Triton backend does on the host in a call, with null launches: counted, not timed."""

import copy
import pickle
import re

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="triton isn't installed")

from sparse_dit import cli
from sparse_dit.attention import sparse_attention
from sparse_dit.backends.triton import bound, tables, work
from sparse_dit.bench.host import PATTERNS, null_gpu
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout

SIZES = [(1, 8, 8), (2, 12, 20), (3, 17, 31), (5, 16, 16), (4, 32, 32)]
READS = {"item", "tolist", "cpu", "to", "numpy", "nonzero", "__bool__", "__int__", "__float__",
         "__index__", "is_nonzero", "equal", "allclose", "unique", "clone", "contiguous", "copy_",
         "index_select", "gather", "__getitem__", "cuda"}  # fmt: skip


class Counted(TorchFunctionMode):
    """Names of the torch functions that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class Forgetful(dict):
    """Instead of `bound.COMPILED`: every launch is looked up by Triton."""

    def __setitem__(self, key, compiled):
        pass


def tensors(layout, heads=6, dim=64, kv_heads=2, batch=1, dtype=torch.bfloat16):
    """`[B, H, N, D]`, as hosts have them: tokens before heads."""
    shapes = [(batch, layout.seq_len, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes]


def run(layout, patterns, **options):
    index = build_index((patterns * 6)[:6], layout)
    return sparse_attention(*tensors(layout, **options), index, backend="triton")


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_a_call_with_a_cached_index_makes_nothing_anew_and_waits_for_nothing(patterns, monkeypatch):
    layout = TokenLayout.video(2, 16, 16, text_after=7)
    index = build_index((patterns * 6)[:6], layout)
    q, k, v = tensors(layout)
    with null_gpu() as gpu, torch.no_grad():
        sparse_attention(q, k, v, index, backend="triton")
        first = [launch.kernel for launch in gpu.launches]
        gpu.launches.clear()
        for module, name in ((work, "_work"), (tables, "_build"), (tables, "tables_of")):
            monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(name))
        with Counted() as counted:
            out = sparse_attention(q, k, v, index, backend="triton")
    far = patterns is PATTERNS["far field"]
    assert [launch.kernel for launch in gpu.launches] == first == ["pool"] * far + ["attend"]
    assert not READS & set(counted.names), counted.names
    assert counted.names.count("empty") + counted.names.count("empty_like") <= 5
    launch = gpu.launches[-1]
    given = [x.data_ptr() for x in launch.arguments[:4]]
    assert given == [x.data_ptr() for x in (q, k, v, out)], "sorted tokens cost no copy"
    assert index.entries[0].q_order is not None and out.stride() == q.stride()


def test_the_counter_sees_what_waits():
    with Counted() as counted:
        x = torch.ones(2)
        x.tolist(), x[0].item(), bool(x[0] > 0)
    assert {"tolist", "item", "__bool__", "__getitem__"} <= set(counted.names)


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dim", [64, 128])
def test_other_sizes_and_frames_compile_nothing_anew(patterns, dim, monkeypatch):
    """Triton's own keys of what it would compile; tiles of 64 and of 128 rows are two kernels."""
    blocks = set()
    with null_gpu() as gpu, torch.no_grad():
        monkeypatch.setattr(bound, "COMPILED", Forgetful())
        for size in SIZES:
            for text in (0, 1, 77):
                run(
                    TokenLayout.video(*size, text_after=text), patterns, dim=dim, batch=1 + text % 2
                )
        place = list(_kernel().arg_names).index("BLOCK_M")
        blocks = {x.arguments[place] for x in gpu.launches if x.kernel == "attend"}
        assert blocks <= {64, 128}
        made = [name for name, _ in gpu.specialised]
        far = patterns is PATTERNS["far field"]
        assert sorted(made) == sorted(["attend"] * len(blocks) + ["pool"] * far)
        before = len(made)
        run(TokenLayout.video(2, 9, 11), patterns, dim=dim, dtype=torch.float16)
        assert len(gpu.specialised) > before, "another dtype is another kernel"


def _kernel():
    from sparse_dit.backends.triton import kernel

    return kernel.attend


def test_a_copied_index_makes_its_own_tables():
    """Tables are found by address: those of the original may be gone."""
    layout = TokenLayout.video(2, 8, 8)
    index = build_index(PATTERNS["far field"], layout)
    q, k, v = tensors(layout, heads=3, kv_heads=1)
    with null_gpu(), torch.no_grad():
        sparse_attention(q, k, v, index, backend="triton")
        (mine,) = index.cache.values()
        for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
            sparse_attention(q, k, v, twin, backend="triton")
            (other,) = twin.cache.values()
            assert isinstance(other, work.Work)
            addresses = {x.data_ptr() for t in other.tables for x in (t.tiles, t.keys, t.steps)}
            assert set(other.heads[:, [0, 2, 3]].flatten().tolist()) == addresses
            assert not torch.equal(other.heads, mine.heads)


def test_the_command_says_what_a_call_takes(capsys):
    assert cli.run(["bench", "host", "--heads", "2", "--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"exact: \d+\.\d us a call, 1 launch\b", said), said
    assert re.search(r"far field: \d+\.\d us a call, 2 launches\b", said), said
    assert "no GPU" in said


def test_it_refuses_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET not set"), null_gpu():
        pass
