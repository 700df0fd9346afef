"""The CPU kernel as torch operators: compiled, exported, misused."""

import pytest
import torch
from torch import nn

from sparse_dit.attention import attend, block_mass, sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.backends.cpu.packed import ENTRY_WORDS, HEADER_WORDS, pack_index, packed_index
from sparse_dit.index import build_index
from sparse_dit.intervals import valid_rows
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Stripe, Window
from tests.helpers.inductor import needs_inductor
from tests.helpers.kernel_cases import in_order

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))

LAYOUT = TokenLayout.video(2, 4, 6, text_after=2)
LOCAL = Pattern(Window(0, 1, 1), (1, 2, 2), far=True)
PATTERNS = [LOCAL, Pattern(Dense()), Pattern(Skip()), Pattern(Stripe(time_width=1), (2, 2, 2))]
SCALE = 0.25
attend_operator = torch.ops.sparse_dit.attend
measured_operator = torch.ops.sparse_dit.attend_measured
mass_operator = torch.ops.sparse_dit.block_mass


def tensors(kv_heads=2, dtype=torch.float32, batch=2, dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, LAYOUT.seq_len, dim) for heads in (len(PATTERNS), kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def index_of(patterns=PATTERNS, **options):
    return build_index(patterns, LAYOUT, group=16, **options)


STOP = valid_rows(torch.tensor([LAYOUT.seq_len, 7]), LAYOUT.seq_len).stop
START = torch.arange(LAYOUT.seq_len).sub(20).int().expand(2, -1)
ROWS = {"all": (None, None), "padded": (None, STOP), "windows": (START, STOP.contiguous())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_opcheck(dtype, rows):
    q, k, v = tensors(dtype=dtype)
    index = index_of()
    words, groups = packed_index(index), index.max_groups
    torch.library.opcheck(attend_operator.default, (q, k, v, words, *rows, SCALE))
    for extra in ((True, 0, 0), (False, 8, groups), (True, 8, groups + 1)):
        torch.library.opcheck(measured_operator.default, (q, k, v, words, *rows, SCALE, *extra))
    lse = attend(
        q, k, v, index, row_start=rows[0], row_stop=rows[1], return_lse=True, backend="cpu"
    ).lse
    arguments = (q, k, words, lse, *rows, SCALE, 8, groups)
    torch.library.opcheck(mass_operator.default, arguments)


def test_opcheck_of_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors())
    words = packed_index(index_of())
    torch.library.opcheck(attend_operator.default, (q, k, v, words, None, None, SCALE))
    out = attend_operator(q, k, v, words, None, None, SCALE)
    assert out.stride() == q.stride()
    assert out.transpose(1, 2).is_contiguous()


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, q, k, v):
        return sparse_attention(q * 2, k, v, self.index) + 1


@needs_inductor
@pytest.mark.filterwarnings("ignore")  # inductor's own, on first compilation
@pytest.mark.parametrize("packed_before", [False, True])
def test_compiled_without_a_graph_break(packed_before):
    q, k, v = tensors()
    index, other = index_of(), index_of([LOCAL, LOCAL, Pattern(Dense()), Pattern(Dense())])
    if packed_before:
        packed_index(index)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, i: sparse_attention(q * 2, k, v, i) + 1, fullgraph=True
    )
    for each in (index, other, index):
        want = sparse_attention(q * 2, k, v, each, backend="cpu") + 1
        torch.testing.assert_close(compiled(q, k, v, each), want)


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_padding_and_results_on_request():
    q, k, v = tensors()
    index = in_order(index_of())

    def run(q, k, v, stop):
        result = attend(q, k, v, index, row_stop=stop, return_lse=True, mass_block=8)
        return result, block_mass(q, k, index, result.lse, mass_block=8, row_stop=stop)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, STOP), run(q, k, v, STOP))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("packed_before", [False, True])
def test_exported(strict, packed_before):
    q, k, v = tensors()
    layer = Layer(index_of())
    if packed_before:
        packed_index(layer.index)
    program = torch.export.export(layer, (q, k, v), strict=strict)
    assert attend_operator.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(q, k, v), layer(q, k, v))


def test_the_mass_of_a_cached_lse_is_the_mass():
    q, k, v = tensors()
    for causal in (False, True):
        index = in_order(index_of()) if causal else index_of()
        for stop in (None, STOP):
            for backend in ("cpu", "gather", "reference"):
                result = attend(
                    q, k, v, index, row_stop=stop, backend=backend, return_lse=True, mass_block=8
                )
                mass = block_mass(
                    q, k, index, result.lse, mass_block=8, row_stop=stop, backend=backend
                )
                torch.testing.assert_close(mass, result.mass, atol=1e-5, rtol=1e-4)


def test_mass_needs_an_lse_of_the_call():
    q, k, _ = tensors()
    for lse in (torch.zeros(2, 4, 3), torch.zeros(2, 4, LAYOUT.seq_len).double()):
        with pytest.raises(ValueError, match="lse must be float32"):
            block_mass(q, k, index_of(), lse, mass_block=8)
        with pytest.raises(ValueError, match="lse must be float32"):
            mass_operator(q, k, packed_index(index_of()), lse, None, None, SCALE, 8, 4)
    with pytest.raises(ValueError, match="mass_block must be >= 1"):
        block_mass(q, k, index_of(), torch.zeros(2, 4, LAYOUT.seq_len), mass_block=0)


def test_gradients_are_refused():
    q, k, v = tensors()
    words = packed_index(index_of())
    v.requires_grad_()
    with pytest.raises(ValueError, match=r"for inference; call it under torch.no_grad"):
        attend_operator(q, k, v, words, None, None, SCALE)
    with torch.no_grad():
        assert not attend_operator(q, k, v, words, None, None, SCALE).requires_grad


def test_autocast_computes_in_its_dtype():
    q, k, v = tensors()
    want = sparse_attention(*(x.bfloat16() for x in (q, k, v)), index_of(), backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse_attention(q, k, v, index_of(), backend="cpu"), want)


BAD = {
    "dtype": (lambda a: {x: a[x].double() for x in "qkv"}, "share float32, bfloat16 or float16"),
    "mixed dtypes": (lambda a: {"k": a["k"].half()}, "share float32"),
    "integers": (lambda a: {x: a[x].int() for x in "qkv"}, "share float32"),
    "no batch": (lambda a: {"q": a["q"][0]}, "q must be"),
    "unlike k": (lambda a: {"v": a["v"][:, :, 1:]}, "q must be"),
    "channels": (lambda a: {"q": a["q"][..., :8]}, "agree in B and D"),
    "odd channels": (lambda a: {x: a[x][..., :12] for x in "qkv"}, "multiple of 8"),
    "batch": (lambda a: {"q": a["q"][:1]}, "agree in B and D"),
    "heads": (lambda a: {x: a[x][:, [0, 0, 1]] for x in "kv"}, "multiple of the key heads"),
    "fewer heads": (lambda a: {"q": a["q"][:, :2]}, "packed for other heads"),
    "fewer queries": (lambda a: {"q": a["q"][:, :, 1:]}, "packed for other heads or lengths"),
    "fewer keys": (lambda a: {x: a[x][:, :, 1:] for x in "kv"}, "packed for other"),
    "index dtype": (lambda a: {"index": a["index"].long()}, "must be contiguous int32"),
    "index shape": (lambda a: {"index": a["index"][None]}, "must be contiguous int32"),
    "index stride": (lambda a: {"index": a["index"][::2]}, "must be contiguous int32"),
    "empty index": (lambda a: {"index": a["index"][:0]}, "is missing"),
    "rows shape": (lambda a: {"row_stop": STOP[:1]}, r"row_stop must be int32 \[2, 50\]"),
    "rows dtype": (lambda a: {"row_start": STOP.long()}, "row_start must be int32"),
    "scale": (lambda a: {"scale": float("nan")}, "scale finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_errors(case):
    change, match = BAD[case]
    q, k, v = tensors()
    arguments = {"q": q, "k": k, "v": v, "index": packed_index(index_of())}
    arguments |= {"row_start": None, "row_stop": None, "scale": SCALE}
    with pytest.raises(ValueError, match=match) as error:
        attend_operator(*{**arguments, **change(arguments)}.values())
    assert "\n" not in str(error.value)


def test_tensors_elsewhere_are_no_cpu_call():
    q, k, v = tensors()
    words = packed_index(index_of())
    out = attend_operator(*(x.to("meta") for x in (q, k, v, words)), None, None, SCALE)
    assert out.is_meta and out.shape == q.shape
    with pytest.raises(ValueError, match="must be on one device, got"):
        attend_operator(q, k.to("meta"), v, words, None, None, SCALE)


def test_mass_that_has_no_room_is_an_error():
    q, k, v = tensors()
    words = packed_index(index_of())
    for extra in ((False, 8, 1), (False, 8, 0), (False, -1, 4)):
        with pytest.raises(ValueError, match="mass"):
            measured_operator(q, k, v, words, None, None, SCALE, *extra)


def test_a_truncated_index_is_an_error():
    q, k, v = tensors()
    words = packed_index(index_of())
    for size in [*range(1, 80), *range(80, len(words), 7), len(words) - 1]:
        with pytest.raises(ValueError, match="index"):
            attend_operator(q, k, v, words[:size].clone(), None, None, SCALE)


def test_a_corrupted_index_is_an_error_or_an_answer():
    """Never a crash: whatever a word is, the kernel refuses it or stays inside of its tensors."""
    q, k, v = tensors(batch=1)
    words = packed_index(index_of())
    start = HEADER_WORDS + ENTRY_WORDS * len(PATTERNS)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in [*range(start + len(PATTERNS)), *range(start, len(words), 11)]:
        values = torch.randint(-(2**31), 2**31 - 1, (2,), generator=generator).tolist()
        for value in (-1, 0, 1, len(words), 2**31 - 1, -(2**31), *values):
            broken = words.clone()
            broken[place] = value
            try:
                attend_operator(q, k, v, broken, None, None, SCALE)
            except ValueError as error:
                assert "index" in str(error)
                refused += 1
    assert refused > 100


def test_an_index_is_packed_once():
    index = index_of()
    assert packed_index(index) is packed_index(index)
    assert torch.equal(packed_index(index), pack_index(index))
    moved = index.to("cpu")
    assert packed_index(moved) is not packed_index(index)
    assert packed_index(index).dtype == torch.int32
