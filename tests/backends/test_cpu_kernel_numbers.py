"""The native CPU kernel on numbers that are large, tiny, infinite or none at all."""

import functools
import itertools

import pytest
import torch

from sparse_dit.attention import attend
from sparse_dit.backends.cpu import library
from sparse_dit.index import SparseIndex
from tests.helpers.kernel_cases import (
    DTYPES,
    assert_close,
    dense,
    entry,
    in_order,
    one_head,
    qkv,
    relative,
    until,
)

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=str(library.PROBLEM))
NONE = (torch.nan, torch.inf, -torch.inf)


def check(index, inputs, variant, **keywords):
    rounds = "bf16" in variant and inputs[0].dtype == torch.bfloat16
    ours = attend(*inputs, index, backend="cpu", return_lse=True, **keywords)
    assert_close(ours, inputs, index, rounds_weights=rounds, **keywords)
    return ours


def mixed(n=100, m=300):
    """Dense, blocks, far field."""
    cells = [*range(100, m, 25), m]
    far = entry(
        m, [50, 50], [range(90), range(50, 100)], cells=cells, pooled=[range(8), range(2, 8)]
    )
    blocks = entry(m, [64, 36], [range(64), [*range(10, 20), *range(128, m)]])
    return SparseIndex((dense(n, m), blocks, far), (0, 1, 2))


def along(logits, dim=16):
    """q and k with these logits (for a scale of 1): exact, in the first channel."""
    q, k = torch.zeros(1, 1, 20, dim), torch.zeros(1, 1, len(logits), dim)
    q[..., 0] = 1
    k[..., 0] = torch.as_tensor(logits)
    return q, k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 8, 60])
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits(variant, dtype, size, causal):
    """Within the bound, and about as wrong as float32 arithmetic on the whole matrix."""
    index = in_order(mixed(), 190) if causal else mixed()
    q, k, v = qkv(index, 64, dtype=dtype, seed=size)
    q, k = q * size, k * size
    ours = check(index, (q, k, v), variant, mass_block=32)
    wide = [x.double() for x in (q, k, v)]
    truth = attend(*wide, index, backend="reference").out
    low = attend(*(x.float() for x in wide), index, backend="reference").out
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    if "bf16" not in variant:
        worst = (low - truth).abs().max()
        assert (ours.out.double() - truth).abs().max() <= 3 * worst + rounding


SHAPES = {
    "rising": torch.linspace(-500, 500, 640),
    "rising slowly": torch.linspace(-60, 60, 640),
    "falling": torch.linspace(500, -500, 640),
    "a step a tile": torch.arange(640) // 64 * 100.0,
    "a peak at the end": torch.cat([torch.zeros(639), torch.tensor([3000.0])]),
    "a peak at the start": torch.cat([torch.tensor([3000.0]), torch.zeros(639)]),
    "zig-zag": torch.arange(640) % 2 * 2000.0 - 1000,
    "constant": torch.full((640,), 7.0),
    "all low": torch.full((640,), -1e4),
    "all high": torch.full((640,), 1e4),
    "just bounded": torch.linspace(-44, 44, 640),
    "one key": torch.tensor([-1e5]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes_of_logits(variant, shape, causal):
    q, k = along(SHAPES[shape].bfloat16().float())
    m = k.shape[2]
    index = one_head(dense(20, m))
    index = in_order(index, m - 10) if causal else index
    v = qkv(index, 16)[2]
    for dtype in DTYPES:
        inputs = [x.to(dtype) for x in (q, k, v)]
        check(index, inputs, variant, scale=1.0, mass_block=64)


@pytest.mark.parametrize("logit", [-40.0, 0.0, 40.0])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_any_size(variant, logit, size, dtype):
    """Weights are at most 1, however they are computed: values neither overflow nor vanish."""
    q, k = along([logit] * 100)
    index = one_head(dense(20, 100))
    v = (qkv(index, 16)[2] * size).to(dtype)
    check(index, (q.to(dtype), k.to(dtype), v), variant, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_denormals(variant, dtype, which):
    index = mixed()
    tiny = torch.finfo(dtype).smallest_normal / 3
    inputs = qkv(index, 24, dtype=dtype)
    inputs = [
        (x.double() * tiny).to(dtype) if name in which else x
        for name, x in zip("qkv", inputs, strict=True)
    ]
    assert any(((x != 0) & (x.abs() < torch.finfo(dtype).smallest_normal)).any() for x in inputs)
    check(index, inputs, variant)


@functools.cache
def apart(n, keys=1):
    """n rows that see `keys` keys each, none the same."""
    lists = torch.arange(n * keys).view(n, keys)
    return one_head(entry(n * keys, [1] * n, list(lists)))


def every_number(dtype):
    """All 65,536 numbers of a 16-bit dtype, `[8192, 8]`."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(-1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_survives(variant, dtype):
    """A row that sees one key gets its value, bit for bit, Inf and NaN too."""
    values = every_number(dtype)
    q = torch.zeros(1, 1, *values.shape, dtype=dtype)
    out = attend(q, q, values[None, None], apart(len(values)), backend="cpu").out[0, 0]
    assert torch.equal(out.isnan(), values.isnan())
    real = ~values.isnan()
    if "bf16" in variant and dtype == torch.bfloat16:  # whose instructions take denormals for 0
        real &= values.abs() >= torch.finfo(dtype).smallest_normal
    assert torch.equal(out[real], values[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_round_to_the_nearest(variant, dtype):
    """The mean of two neighbours lies in the middle: it goes to the even one."""
    values = every_number(dtype)
    values = values[values.isfinite().all(-1) & (values.abs() < 1e30).all(-1)]
    values = values[(values.abs() >= torch.finfo(dtype).smallest_normal).all(-1)]
    pairs = torch.stack([values, values.flatten().roll(1).view_as(values)], 1)  # [n, 2, 8]
    n, index = len(pairs), apart(len(pairs), 2)
    q = torch.zeros(1, 1, n, 8, dtype=dtype)
    k = torch.zeros(1, 1, 2 * n, 8, dtype=dtype)
    out = attend(q, k, pairs.view(1, 1, 2 * n, 8), index, backend="cpu").out[0, 0]
    assert torch.equal(out, pairs.float().mean(1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["q", "k"])
def test_every_query_and_key_is_read_right(variant, dtype, side):
    """The LSE of a row that sees one key is its logit."""
    numbers = every_number(dtype).flatten()
    numbers = torch.where(numbers.abs() < 1e6, numbers, 0)
    n, index = len(numbers), apart(len(numbers))
    x, one = torch.zeros(1, 1, n, 8, dtype=dtype), torch.zeros(1, 1, n, 8, dtype=dtype)
    x[0, 0, :, 5], one[..., 5] = numbers, 1
    q, k = (x, one) if side == "q" else (one, x)
    lse = attend(q, k, k, index, scale=1.0, backend="cpu", return_lse=True).lse[0, 0]
    torch.testing.assert_close(lse.double(), numbers.double(), rtol=2**-21, atol=1e-6)


def sees(index, inputs, row):
    """Which query rows see the key token `row`, alone or in a cell: bool `[B, H, N]`."""
    q, k, v = (x.double() for x in inputs)
    mark = torch.zeros_like(v)
    mark[:, :, row] = 1
    return attend(q, k, mark, index, backend="reference").out[..., 0] > 0


def assert_close_where_finite(ours, want, inputs, index, variant):
    """`inputs` are those without poison: bounds follow from them."""
    q, k, v = inputs
    finite = want.isfinite()
    rounding = torch.finfo(v.dtype).eps * (2 if "bf16" in variant else 1)
    share = relative(q, k, index=index)[..., None] + rounding
    error = (ours.double() - want).abs() / (share * v.double().abs().max())
    assert finite.any() and error[finite].max() <= 1


CHANNELS = (slice(3, 4), slice(None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_reach_only_who_sees_them(variant, dtype, value, causal):
    index = in_order(mixed(), 140) if causal else mixed()
    clean = qkv(index, 16, dtype=dtype)
    same = attend(*clean, index, backend="cpu").out
    for which, rows in ((0, (7, 99)), (1, (0, 15, 150, 299))):
        for row in rows:
            for channels in CHANNELS:
                inputs = [x.clone() for x in clean]
                inputs[which][0, :, row, channels] = value
                wide = [x.double() for x in inputs]
                want = attend(*wide, index, backend="reference", return_lse=True)
                ours = attend(*inputs, index, backend="cpu", return_lse=True)
                assert torch.equal(ours.out.isfinite(), want.out.isfinite())
                assert torch.equal(ours.lse.isfinite(), want.lse.isfinite())
                assert_close_where_finite(ours.out, want.out, clean, index, variant)
                if which == 0:  # the other groups take the same path as without it
                    other = slice(64, 100) if row < 64 else slice(0, 64)
                    assert torch.equal(ours.out[0, 1, other], same[0, 1, other])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("causal", [False, True])
def test_values_reach_only_who_sees_them(variant, dtype, value, causal):
    index = in_order(mixed(), 140) if causal else mixed()
    clean = qkv(index, 16, dtype=dtype)
    same = attend(*clean, index, backend="cpu", return_lse=True)
    truth = attend(*(x.double() for x in clean), index, backend="reference").out
    for row in (0, 15, 64, 150, 200, 299):
        seen = sees(index, clean, row)
        for channels in CHANNELS:
            q, k, v = (x.clone() for x in clean)
            v[0, :, row, channels] = value
            want = truth.clone()
            want[..., channels] = torch.where(seen[..., None], value, want[..., channels])
            ours = attend(q, k, v, index, backend="cpu", return_lse=True)
            assert torch.equal(ours.lse, same.lse)
            assert torch.equal(ours.out.isnan(), want.isnan())
            assert torch.equal(ours.out[want.isinf()].double(), want[want.isinf()])
            assert_close_where_finite(ours.out, want, clean, index, variant)
            blind = ~seen if not causal else ~seen & ~group_sees(index, seen)
            assert torch.equal(ours.out[blind], same.out[blind])


def group_sees(index, seen):
    """Whether any row of a row's group sees it: bool `[B, H, N]`."""
    result = seen.clone()
    for head, pattern in enumerate(index.head_to_pattern):
        bounds = index.entries[pattern].q_offsets.tolist()
        for start, stop in itertools.pairwise(bounds):
            result[:, head, start:stop] = seen[:, head, start:stop].any(-1, keepdim=True)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NONE)
def test_padding_may_hold_anything(variant, dtype, value):
    """Padding has no effect at all: not on paths, not on pooled keys."""
    index = mixed()
    lengths = (0, 15, 111, 299)
    q, k, v = qkv(index, 16, batch=4, dtype=dtype)
    keywords = {
        "row_stop": until(index, *lengths),
        "backend": "cpu",
        "return_lse": True,
        "mass_block": 50,
    }
    want = attend(q, k, v, index, **keywords)
    for b, valid in enumerate(lengths):
        k[b, :, valid:], v[b, :, valid:] = value, value
    for ours, same in zip(attend(q, k, v, index, **keywords), want, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NONE)
def test_unseen_keys_may_hold_anything(variant, dtype, value):
    """Keys in no run, and keys after the last that a causal row sees."""
    index = in_order(one_head(entry(200, [30, 30], [range(10, 50), range(100)])))
    q, k, v = qkv(index, 16, dtype=dtype)
    want = attend(q, k, v, index, backend="cpu", return_lse=True, mass_block=50)
    k[:, :, 60:], v[:, :, 60:] = value, value
    ours = attend(q, k, v, index, backend="cpu", return_lse=True, mass_block=50)
    for x, same in zip(ours, want, strict=True):
        torch.testing.assert_close(x, same, rtol=2 * torch.finfo(x.dtype).eps + 2e-5, atol=1e-6)


def test_mass_of_other_groups_stays_clean(variant):
    index = one_head(entry(100, [20, 20], [range(40), range(30, 100)]))
    q, k, v = qkv(index, 16)
    k[:, :, 80] = torch.nan
    mass = attend(q, k, v, index, backend="cpu", mass_block=10).mass[0, 0]
    assert mass[0].isfinite().all() and mass[0].sum() == pytest.approx(20, abs=1e-3)
    assert mass[1, 3:].isnan().all()
