"""The Triton kernels' PTX for sm_80, executed on the CPU; and faults put into it, which must be found."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton isn't installed")

from sparse_dit.attention import attend
from sparse_dit.backends.triton import work
from tests.gpu_without_gpu.ptx.arithmetic import operation
from tests.gpu_without_gpu.ptx.decode import decoded
from tests.gpu_without_gpu.ptx.device import emulated_gpu
from tests.gpu_without_gpu.ptx.program import Fault, parsed
from tests.gpu_without_gpu.triton_emulated import POOLED, Case, made, run
from tests.helpers.kernel_cases import dense, one_head, qkv

PLAIN = Case("mixed", "bf16", 64)
PADDED = Case("lists", "fp16", 128, causal=True, padded=True)
FAR = Case("cells", "bf16", 64, causal=True)
TESTED = [
    PLAIN,
    PADDED,
    FAR,
    Case("mixed", "fp16", 64, causal=True),
    Case("lists", "bf16", 80, padded=True),
    Case("far", "fp16", 96, padded=True),
    Case("large", "bf16", 128),
]


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    """What `torch.empty` makes holds NaN, as in the interpreter's tests."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # block mass has no fixed order
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_compiled_kernels_compute_what_the_reference_does(case):
    """Numbers, and nothing out of bounds, racing, in flight or uninitialised; most code is run."""
    _, gpu = run(case)
    wanted = {"attend", "pool"} if case.kind in POOLED else {"attend", "mass"}
    assert {kernel.program.name for kernel in gpu.done} == wanted
    for kernel, done in gpu.done.items():
        assert len(done) > 0.95 * len(kernel.program.instructions)


def test_lines_of_nan_and_infinity():
    """Threads of a warp branch apart there, in the logarithm; other rows see nothing of it."""
    index = one_head(dense(70, 90))
    q, k, v = qkv(index, 64, dtype=torch.bfloat16)
    with emulated_gpu():
        want = attend(q, k, v, index, backend="triton", return_lse=True)
        q[0, 0, 3] = torch.inf
        got = attend(q, k, v, index, backend="triton", return_lse=True)
    others = torch.arange(70) != 3
    assert got.out[0, 0, 3].isnan().all() and got.lse[0, 0, 3].isnan()
    assert torch.equal(got.out[:, :, others], want.out[:, :, others])
    assert torch.equal(got.lse[:, :, others], want.lse[:, :, others])


@pytest.mark.parametrize("start", [0, 3])
def test_only_steps_in_which_an_interval_ends_are_masked(start):
    """Of four steps of 64 keys three end before key 200; behind a start none is known to be whole."""
    index = one_head(dense(256, 256))
    inputs = qkv(index, 64, dtype=torch.bfloat16)
    bounds = {name: torch.full((1, 256), end, dtype=torch.int32)
              for name, end in (("row_start", start), ("row_stop", 200))}  # fmt: skip
    with emulated_gpu() as gpu:
        attend(*inputs, index, backend="triton", **bounds)
    ((kernel, done),) = gpu.done.items()
    products = [i for i, x in enumerate(kernel.program.instructions) if x.text.startswith("mma")]
    per_loop = {done[i] / gpu.blocks for i in products}
    assert per_loop == ({3, 1} if start == 0 else {0, 4})


def test_strides_of_tokens_before_heads():
    index, inputs, *_ = made(PLAIN)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    with emulated_gpu():
        want = attend(*inputs, index, backend="triton").out
        got = attend(*turned, index, backend="triton").out
    assert torch.equal(got, want) and got.stride() == turned[0].stride()


def replaced(pattern, by, number=0):
    """A fault: what matches, for the `number`-th time, becomes something else."""

    def change(text):
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + match.expand(by) + text[match.end() :]

    return change


class Seeded(NamedTuple):
    """A fault put into a kernel.

    Args:
        finds: How what finds it begins.
        change: What is done to the text.
        kernel: Whose text.
        case: That must find it.
    """

    finds: str
    change: Callable[[str], str]
    kernel: str = "attend"
    case: Case = PLAIN


INSIDE = r"setp\.lt\.s32 \t(%p\d+), (%r\d+), (%r\d+);"
SUM = r"(mma\S* \{ (%r\d+), (%r\d+),[^{]*\{[^{]*\{[^{]*\{) \2, \3,"
FAULTS = {
    "no barrier after the wait": Seeded(
        "race: read of what another thread wrote",
        replaced(r"(cp\.async\.wait_group \t2;\n)\tbar\.sync \t0;\n", r"\1"),
    ),
    "no barrier before keys are overwritten": Seeded(
        "race: write over what another warp reads",
        replaced(r"\tbar\.sync \t0;\n(?=(?:(?!\tbar).*\n)*\$L__BB0_3:)", ""),
    ),
    "no last barrier": Seeded(
        "race: read of what another thread wrote", replaced(r"\tbar\.sync \t0;\n", "", -1)
    ),
    "no barrier in the sum of block mass": Seeded(
        "race:", replaced(r"\tbar\.sync \t0;\n", "", -3), "mass"
    ),
    "no barrier of a warp": Seeded(
        "race: read of what another thread wrote",
        replaced(r"\tbar\.warp\.sync \t-1;\n", ""), "pool", FAR,
    ),
    "a group less is waited for": Seeded(
        "in flight: read of a copy", replaced(r"(cp\.async\.wait_group \t)2;", r"\g<1>3;")
    ),
    "the last copies aren't waited for": Seeded(
        "in flight: copies that were never waited for",
        replaced(r"(cp\.async\.wait_group \t)0;", r"\g<1>1;"),
    ),
    "two groups of copies are one": Seeded(
        "in flight: read of a copy", replaced(r"\tcp\.async\.commit_group;\n", "", 2)
    ),
    "keys that aren't there": Seeded(
        "out of bounds: read",
        replaced(r"@%p\d+ (ld\.global\.v4\.b32)", r"\1", 8),  # the first eight are of queries
        case=PADDED,
    ),
    "values that aren't there": Seeded(
        "out of bounds: read",
        replaced(r"@%p\d+ (ld\.global\.v4\.b32)", r"\1", 10),
        case=PADDED,
    ),
    "a row too many": Seeded(
        "race: two blocks write the same|out of bounds",
        replaced(INSIDE, r"setp.le.s32 \t\1, \2, \3;"),
    ),
    "an address doubled": Seeded(
        "out of bounds|misaligned",
        replaced(r"mad\.wide\.s32 \t(%rd\d+), (%r\d+), 2,", r"mad.wide.s32 \t\1, \2, 4,"),
    ),
    "an address 2 bytes off": Seeded(
        "misaligned", replaced(r"(ld\.global\.v4\.b32 [^+]*\+ )0", r"\g<1>2")
    ),
    "shared memory 64 KiB further": Seeded(
        "out of bounds: shared memory", replaced(r"(ldmatrix[^+\n]*\+)1024", r"\g<1>65536")
    ),
    "a register that isn't set": Seeded(
        "uninitialised: register", replaced(r"\tex2\.approx\.ftz\.f32 [^\n]*\n", "")
    ),
    "a place that isn't written": Seeded(
        "uninitialised: read of shared", replaced(r"\tst\.shared\.v4\.b32 [^\n]*\n", "")
    ),
    "an output that isn't stored": Seeded(
        "unwritten", replaced(r"\t(@%p\d+ )?st\.global\.v4\.b32 [^\n]*\n", "")
    ),
    "a branch by thread": Seeded(
        "divergent",
        replaced(r"\t@%p\d+ bra \t(\$L__BB0_2;)",
                 r"\tmov.u32 \t%r0, %tid.x;\n\tsetp.gt.u32 \t%p0, %r0, 40;\n\t@%p0 bra \t\1"),
    ),
    "rows of operand A exchanged": Seeded(
        "numbers", replaced(r"(mma[^{]*\{[^}]*\}, \{) (%r\d+), (%r\d+)", r"\1 \3, \2", 3)
    ),
    "columns of a sum exchanged": Seeded("numbers", replaced(SUM, r"\1 \3, \2,", 40)),
    "values not transposed": Seeded("numbers", replaced(r"\.x4\.trans\.", ".x4.")),
    "rows that disagree on their maximum": Seeded(
        "race: two threads write to one place at once",
        replaced(r"(shfl\.sync\.bfly\.b32 .*), 1, 31, -1", r"\1, 4, 31, -1"),
    ),
    "mass of a neighbouring block": Seeded(
        "out of bounds: add|numbers",
        replaced(r"(atom\.global\S* %r\d+, \[ %rd\d+ \+ )0", r"\g<1>4"), "mass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    """Each by the check that is there for it."""
    seeded = FAULTS[name]
    changed = []

    def change(running, text):
        if running != seeded.kernel:
            return text
        changed.append((text, seeded.change(text)))
        return changed[-1][1]

    with pytest.raises((Fault, AssertionError)) as found:
        run(seeded.case, change)
    said = "numbers" if found.type is AssertionError else str(found.value)
    assert changed[0][0] != changed[0][1], "nothing was changed"
    assert re.match(seeded.finds, said), said


TABLE_FAULTS = {  # name: table, place, value, what must find it
    "a token too far": ("keys", 3, 131, "out of bounds: read .* of a tensor of torch.bfloat16"),
    "a negative token": ("keys", 3, -2, "out of bounds: read .* of a tensor of torch.bfloat16"),
    "a step too far": ("steps", 0, 1 << 20, "out of bounds: read .* of a tensor of torch.int32"),
    "a query twice": ("q_tokens", 0, 1, "race: two blocks write the same|unwritten"),
    "a query too far": ("q_tokens", 130, 131, "out of bounds: read"),
    "a key twice": ("keys", 3, 5, "numbers"),
}


@pytest.mark.parametrize("name", TABLE_FAULTS)
def test_a_wrong_table_is_found(name, monkeypatch):
    table, place, value, finds = TABLE_FAULTS[name]
    index, _, given, _, truth = made(PLAIN)
    fresh = type(index)(index.entries, index.head_to_pattern, index.rows)

    def wrong(*arguments, **keywords):
        tables = build(*arguments, **keywords)
        getattr(tables, table)[place] = value
        return tables

    build = work.tables_of
    monkeypatch.setattr(work, "tables_of", wrong)
    for e in fresh.entries:
        e.cache.clear()
    try:
        with emulated_gpu(), pytest.raises((Fault, AssertionError)) as found:
            out = attend(*given, fresh, backend="triton").out
            assert ((out - truth[0].out).abs() < 0.05).all()
    finally:
        for e in fresh.entries:
            e.cache.clear()
    said = "numbers" if found.type is AssertionError else str(found.value)
    assert re.match(finds, said), said


def test_a_tile_launched_twice_is_found(monkeypatch):
    index, _, given, *_ = made(PLAIN)
    fresh = type(index)(index.entries, index.head_to_pattern, index.rows)
    order = work.launch_order

    def twice(costs):
        ranked = order(costs)
        return torch.cat([ranked[:1], ranked[:-1]])

    monkeypatch.setattr(work, "launch_order", twice)
    with emulated_gpu(), pytest.raises(Fault, match="race: two blocks write the same"):
        attend(*given, fresh, backend="triton")


def test_what_is_unknown_is_an_error_that_names_its_line():
    head = ".visible .entry toy(\n)\n.reqntid 32\n{\n"
    with pytest.raises(Fault, match=r"unknown opcode: wgmma.x; line 5: wgmma\.x %r1;"):
        decoded(parsed(head + "wgmma.x %r1;\nret;\n}"), 0)
    with pytest.raises(Fault, match="not an instruction: line 5"):
        parsed(head + "call me\n}")


def computed(opcode, *operands):
    meaning = operation(opcode)
    typed = [np.asarray(x).view(kind) for x, kind in zip(operands, meaning.reads, strict=True)]
    with np.errstate(all="ignore"):
        return meaning.result(*typed)


def test_arithmetic_is_that_of_torch():
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    numbers[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, 1e-40])
    x = numbers.numpy()
    half = computed("cvt.rn.bf16.f32", x)
    assert np.array_equal(half, numbers.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(computed("cvt.f32.bf16", half), numbers.bfloat16().float().numpy())
    pair = computed("cvt.rn.f16x2.f32", x[:500], x[500:])
    want = numbers.half().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(pair >> 16, want[:500]) and np.array_equal(pair & 0xFFFF, want[500:])
    assert computed("ex2.approx.ftz.f32", x)[3] == 1
    assert computed("setp.ne.f32", x, np.full_like(x, np.nan)).sum() == 0
    whole = np.array([-7, 7, -7, 5], np.int32)
    by = np.array([2, -2, -2, 0], np.int32)
    assert computed("div.s32", whole, by).tolist() == [-3, -3, 3, -1]
    assert computed("shr.s32", whole, np.uint32([1, 1, 40, 0])).tolist() == [-4, 3, -1, 5]
    assert computed("shl.b32", whole, np.uint32([1, 32, 0, 2]))[1] == 0
    assert computed("bfe.s32", whole, np.uint32([0] * 4), np.uint32([3] * 4)).tolist() == [
        1,
        -1,
        1,
        -3,
    ]
    assert computed("mul.wide.s32", whole, by).tolist() == [-14, -14, 14, 0]
