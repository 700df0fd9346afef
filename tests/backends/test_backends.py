import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_dit.attention import BACKENDS, attend, sparse_attention
from sparse_dit.backends.cpu import library
from sparse_dit.backends.reference import token_mask
from sparse_dit.index import build_index
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Skip, Window
from tests.helpers.cases import LAYOUTS, PATTERN_CASES
from tests.helpers.kernel_cases import pattern_case

NO_KERNEL = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))
HERE = ("cpu", "gather", "reference")  # the others have tests of their own
ALL = [pytest.param(name, marks=NO_KERNEL if name == "cpu" else ()) for name in HERE]
FAST = [backend for backend in ALL if backend.values != ("reference",)]
EXACT = {name: torch.float32 if name == "cpu" else torch.float64 for name in BACKENDS}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}
LOCAL = Pattern(Window(0, 1, 1), (1, 2, 2), far=True)


def inputs(layout, heads=3, kv_heads=3, dim=8, batch=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = [(batch, h, layout.seq_len, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) * 1.5 for s in shape]


def assert_same(ours, truth, tolerance=1e-6):
    """Equal up to rounding; in float64 up to the logs of cell sizes, which are kept in float32."""
    torch.testing.assert_close(
        ours.out.double(), truth.out.double(), atol=tolerance, rtol=tolerance
    )
    if truth.lse is not None:
        torch.testing.assert_close(ours.lse, truth.lse, atol=1e-5, rtol=1e-5)
    if truth.mass is not None:
        torch.testing.assert_close(ours.mass, truth.mass, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reference_is_masked_softmax(layout):
    """The specification itself, against PyTorch's own masked attention."""
    q, k, v = inputs(layout)
    for pattern in PATTERN_CASES:
        if pattern.far:
            continue
        index = build_index([pattern] * 3, layout)
        mask = token_mask(index.entries[0])[0]
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num(0.0)
        torch.testing.assert_close(sparse_attention(q, k, v, index, backend="reference"), want)


def test_far_field_of_identical_keys_is_exact():
    """If the keys of a cell are equal, pooling loses nothing."""
    layout = TokenLayout.video(2, 8, 8, text_before=3)
    q, k, v = inputs(layout)
    pattern = Pattern(Window(0, 0, 0), (2, 2, 2), far=True)
    index = build_index([pattern] * 3, layout)
    far, order = index.entries[0].far, index.entries[0].k_order.long()
    for start, stop in zip(far.cell_offsets[:-1], far.cell_offsets[1:], strict=True):
        k[:, :, order[start:stop]] = k[:, :, order[start : start + 1]]
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sparse_attention(q, k, v, index, backend="reference"), want)
    assert index.density < 0.5


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_backend_matches_reference(backend, layout, causal):
    dtype = EXACT[backend]
    for first in range(0, len(PATTERN_CASES), 6):
        for padded in (False, True):
            case = pattern_case(layout, causal, first, padded)
            q, k, v = (x.to(dtype) for x in case.inputs)
            for extra in ({}, {"return_lse": True, "mass_block": 16}):
                ours = attend(q, k, v, case.index, row_stop=case.row_stop, backend=backend, **extra)
                truth = case.truth[0]
                assert torch.isfinite(truth.out).all()
                if not extra:
                    truth = truth._replace(lse=None, mass=None)
                assert_same(ours, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 2)], ids=str
)
@pytest.mark.parametrize("dim", [8, 40, 64])
def test_low_precision_is_as_good_as_dense(backend, dtype, factor, dim):
    """Error against float64 at most twice that of PyTorch's masked attention in the same dtype."""
    layout = TokenLayout.video(3, 7, 9, text_after=5)
    q, k, v = inputs(layout, dim=dim, dtype=dtype)
    index = build_index([Pattern(Window(0, 2, 2), (2, 2, 2)), LOCAL, Pattern(Dense())], layout)
    truth = attend(q.double(), k.double(), v.double(), index, backend="reference").out
    low = attend(q, k, v, index, backend="reference").out.double()
    ours = attend(q, k, v, index, backend=backend).out
    assert ours.dtype == dtype
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= factor * (low - truth).abs().max() + floor


@pytest.mark.parametrize("backend", FAST)
def test_strides_do_not_matter(backend):
    layout = TokenLayout.video(2, 4, 6)
    q, k, v = inputs(layout, dtype=EXACT[backend])
    index = build_index([LOCAL, Pattern(Dense()), Pattern(Skip())], layout)
    want = attend(q, k, v, index, backend=backend).out
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attend(*strided, index, backend=backend).out, want)


@pytest.mark.parametrize("backend", ALL)
def test_rows_that_see_nothing_are_zero(backend):
    layout = TokenLayout.video(2, 4, 6)
    q, k, v = inputs(layout, heads=1, kv_heads=1, dtype=EXACT[backend])
    empty = attend(
        q, k, v, build_index([Pattern(Skip())], layout), backend=backend, return_lse=True
    )
    assert (empty.out == 0).all() and empty.lse.isneginf().all()
    padding = attend(
        q,
        k,
        v,
        build_index([LOCAL], layout),
        backend=backend,
        row_stop=torch.zeros(1, layout.seq_len, dtype=torch.int32),
        return_lse=True,
    )
    assert (padding.out == 0).all() and padding.lse.isneginf().all()


@pytest.mark.parametrize("backend", ALL)
def test_lse_merges_partial_results(backend):
    """Two halves of the keys merge into the whole, as ring attention does it."""
    layout = TokenLayout.video(2, 4, 6)
    q, k, v = inputs(layout, heads=1, kv_heads=1, dtype=EXACT[backend])
    near = build_index([Pattern(Window(frames=0), (1, 4, 6))], layout)
    far = build_index([Pattern(Window(), (1, 4, 6))], layout)
    part = attend(q, k, v, near, backend=backend, return_lse=True)
    whole = attend(q, k, v, far, backend=backend, return_lse=True)
    share = (part.lse - whole.lse).exp()
    assert (share < 1).all()
    mass = attend(q, k, v, far, backend=backend, mass_block=24).mass
    torch.testing.assert_close(mass.sum(-1).sum(-1), torch.full((1, 1), 48.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_nan_shows_where_it_is_seen(backend):
    layout = TokenLayout.video(1, 8, 8)
    q, k, v = inputs(layout, heads=1, kv_heads=1, dtype=EXACT[backend])
    v[0, 0, 0] = torch.nan
    index = build_index([Pattern(Window(0, 0, 0), (1, 4, 4))], layout)
    out = attend(q, k, v, index, backend=backend).out[0, 0].view(8, 8, -1)
    assert out[:4, :4].isnan().all() and not out[4:].isnan().any() and not out[:, 4:].isnan().any()
    q[0, 0, 63] = torch.inf
    assert attend(q, k, v, index, backend=backend).out[0, 0, 63].isnan().all()


@pytest.mark.parametrize("backend", FAST)
def test_large_logits_stay_finite(backend):
    layout = TokenLayout.video(2, 4, 6)
    q, k, v = (x * 30 for x in inputs(layout, dtype=torch.float32))
    index = build_index([LOCAL] * 3, layout)
    truth = attend(q.double(), k.double(), v.double(), index, backend="reference").out
    out = attend(q, k, v, index, backend=backend).out.double()
    torch.testing.assert_close(out, truth, atol=1e-2, rtol=1e-3)


BAD = [
    (lambda a: {"q": a["q"][0]}, "q must be"),
    (lambda a: {"k": a["k"][:, :, :5]}, "q must be"),
    (lambda a: {"q": a["q"][..., :4]}, "agree in B and D"),
    (lambda a: {"q": a["q"].int()}, "floating dtype"),
    (lambda a: {"k": a["k"].float(), "v": a["v"].float()}, "floating dtype"),
    (lambda a: {"k": a["k"][:, :2], "v": a["v"][:, :2]}, "multiple of 2 key heads"),
    (lambda a: {"q": a["q"][:, :, :7]}, "the index is for"),
    (lambda a: {"q": a["q"].clone().requires_grad_()}, "for inference"),
    (lambda a: {"row_stop": torch.tensor([1, 2]).int()}, "row_stop must be int32"),
    (lambda a: {"row_start": a["q"][:, 0, :, 0].long()}, "row_start must be int32"),
    (lambda a: {"backend": "cuda"}, "unknown backend 'cuda'"),
    (lambda a: {"mass_block": 0}, "mass_block"),
    (lambda a: {x: a[x].to("meta") for x in "qkv"}, "on one device"),
]


@pytest.mark.parametrize(("change", "match"), BAD, ids=[match for _, match in BAD])
def test_bad_calls(change, match):
    layout = TokenLayout.video(2, 4, 6)
    q, k, v = inputs(layout)
    arguments = {"q": q, "k": k, "v": v, "index": build_index([LOCAL] * 3, layout)}
    with pytest.raises(ValueError, match=match) as error:
        attend(**{**arguments, **change(arguments)})
    assert "\n" not in str(error.value)


def test_large_patterns_are_not_cached(monkeypatch):
    from sparse_dit.backends import chunks

    layout = TokenLayout.video(4, 6, 6)
    q, k, v = inputs(layout, heads=1, kv_heads=1)
    index = build_index([Pattern(Window(0, 0, 0), (2, 3, 3), far=True)], layout)
    want = attend(q, k, v, index, backend="gather").out
    assert "chunks" in index.entries[0].cache
    index.entries[0].cache.clear()
    monkeypatch.setattr(chunks, "CACHED_KEYS", 10)
    assert torch.equal(attend(q, k, v, index, backend="gather").out, want)
    assert "chunks" not in index.entries[0].cache


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("pattern", [Pattern(Dense()), LOCAL], ids=str)
def test_gather_makes_no_tensor_of_tokens_by_tokens(pattern):
    """PyTorch's unfused attention would; dense heads once took it."""
    layout = TokenLayout.video(4, 32, 32)
    q, k, v = inputs(layout, heads=2, kv_heads=2, dtype=torch.float32)
    index = build_index([pattern, LOCAL], layout)
    with _Largest() as largest:
        attend(q, k, v, index, backend="gather")
    assert 0 < largest.numel < layout.seq_len**2 / 4
