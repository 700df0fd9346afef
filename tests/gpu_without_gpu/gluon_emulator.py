"""The Gluon kernel's own source, executed on the CPU: what it computes, and what would go wrong in flight.

The file is executed with stand-ins on torch tensors for `gl`, `tma`, `mbarrier` and the products. Of a
block's partitions one runs at a time, and at each barrier and copy the next one is drawn. Copies arrive when
they are drawn, not when they are issued, and products are computed when they are waited for.
Found are, beside wrong numbers:

- waits that never end, arrivals too many, copies of other sizes than a barrier expects;
- shared memory that is read before it was filled (NaN), or while a copy or another's store is under way;
- operands of a product that change before it is waited for, and results that are read before that;
- stores to shared memory that no fence makes visible to products and copies;
- addresses out of the bounds of a tensor's memory.

Layouts, registers and time aren't in it: for these the compiled code is read (`gluon_aot.py`).
"""

from __future__ import annotations
import __future__

import ast
import builtins
import contextlib
import ctypes
import inspect
import itertools
import math
import random
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparse_dit.backends import gluon
from sparse_dit.backends.gluon import kernel, launch, masks
from sparse_dit.backends.triton.launch import Call

LATE = 8  # how much less likely a copy arrives than a partition goes on


class Fault(AssertionError):
    """Something that a GPU might do wrong without a word."""


class Pointer:
    """Addresses in a tensor's memory: one, or a tensor of them."""

    def __init__(self, memory: Tensor, place: Any) -> None:
        self.memory, self.place = memory, place

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        """Where a tensor begins."""
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        return cls(whole, x.storage_offset())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.place + offset)

    def checked(self, mask: Any) -> Tensor:
        """Places that are read or written, those of `mask` alone; others are 0."""
        place = torch.as_tensor(self.place)
        if mask is not None:
            place, mask = torch.broadcast_tensors(place, torch.as_tensor(mask))
            place = torch.where(mask, place, 0)
        if place.numel() and not 0 <= int(place.min()) <= int(place.max()) < len(self.memory):
            raise Fault("an address is out of bounds")
        return place


class Shared:
    """Shared memory, and whose stores to it no fence has followed yet (0: none)."""

    def __init__(self, data: Tensor, unfenced: Tensor) -> None:
        self.data, self.unfenced = data, unfenced
        self.dtype = data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i], self.unfenced[i])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape), self.unfenced.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.unfenced.permute(order))

    def slice(self, start: int, length: int) -> Shared:
        span = builtins.slice(start, start + length)
        return Shared(self.data[span], self.unfenced[span])

    def load(self, layout: object) -> Tensor:
        me = BLOCK.running + 1
        if ((self.unfenced != 0) & (self.unfenced != me)).any():
            raise Fault("it loads what another partition stored, with nothing between")
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.unfenced.fill_(BLOCK.running + 1)

    def read_asynchronously(self) -> Tensor:
        """Its content, as products and copies see it."""
        if self.unfenced.any():
            raise Fault(
                "a product or copy reads or writes what was stored, and no fence is between"
            )
        return self.data.clone()


class Barrier:
    """An mbarrier: so many arrivals and all expected bytes end a phase."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def arrive(self, count: int) -> None:
        self.missing -= count
        if self.missing < 0:
            raise Fault("more arrive at a barrier than it counts")
        self.settle()

    def settle(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase ^ 1


class Product:
    """A product in flight."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        if isinstance(acc, Product):
            raise Fault("a product adds to one in flight")
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        self.issued = [x.read_asynchronously() for x in self.operands]
        self.a, self.b, self.acc, self.result = a, b, acc, None

    def finish(self) -> None:
        """Compute it from what the operands hold now, which must be what they held then."""
        for operand, then in zip(self.operands, self.issued, strict=True):
            if not torch.equal(operand.read_asynchronously().nan_to_num(7), then.nan_to_num(7)):
                raise Fault("an operand changes while its product is in flight")
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        found = (a.double() @ b.double()).float()
        self.result = found if self.acc is None else self.acc + found


class Block:
    """A block of threads that runs: its partitions take turns."""

    def __init__(
        self, program: tuple[int, int], grid: tuple[int, ...], draw: random.Random
    ) -> None:
        self.program, self.grid, self.draw = program, grid, draw
        self.running = 0
        self._inference = torch.is_inference_mode_enabled()  # which threads don't inherit
        self.memory: list[Shared] = []
        self.copies: list[Callable[[], None]] = []
        self.products: dict[int, list[Product]] = {}
        self._turns: list[threading.Semaphore] = []
        self._back = threading.Semaphore(0)
        self._until: dict[int, Callable[[], bool]] = {}
        self._error: BaseException | None = None

    def specialise(self, functions_and_args: list, warps: list, registers: list) -> None:
        """Run the partitions to their ends."""
        self._turns = [threading.Semaphore(0) for _ in functions_and_args]
        self._until = {n: lambda: True for n in range(len(functions_and_args))}
        threads = [
            threading.Thread(target=self._partition, args=(n, *each), daemon=True)
            for n, each in enumerate(functions_and_args)
        ]
        for thread in threads:
            thread.start()
        while self._until and self._error is None:
            able = [n for n, ready in self._until.items() if ready()]
            choices = [*able * LATE, *(-1 for _ in self.copies)]
            if not choices:
                raise Fault(f"partitions {sorted(self._until)} wait for ever")
            chosen = self.draw.choice(choices)
            if chosen < 0:
                self.copies.pop(self.draw.randrange(len(self.copies)))()
                continue
            self.running = chosen
            self._turns[chosen].release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
        if self.copies or any(self.products.values()):
            raise Fault("copies or products are in flight at the end")

    def _partition(self, number: int, function: Callable, arguments: tuple) -> None:
        self._turns[number].acquire()
        try:
            with torch.inference_mode(self._inference):
                function(*arguments)
        except BaseException as error:
            self._error = error
        del self._until[number]
        self._back.release()

    def turn(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run; come back when it is ready."""
        number = self.running
        self._until[number] = ready
        self._back.release()
        self._turns[number].acquire()


BLOCK = Block((0, 0), (1, 1), random.Random())


class Mbarrier:
    """`mbarrier` of Gluon."""

    class MBarrierLayout:
        pass

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive(1)

    @staticmethod
    def arrive(barrier: Barrier, count: int) -> None:
        barrier.arrive(count)
        BLOCK.turn()

    @staticmethod
    def wait(barrier: Barrier, phase: int) -> None:
        assert phase in (0, 1)
        BLOCK.turn(lambda: barrier.phase != phase)


class Tma:
    """`tma` of Gluon."""

    @staticmethod
    def async_copy_global_to_shared(
        blocks: Any, place: list[int], barrier: Barrier, into: Shared
    ) -> None:
        """Zeros lie beyond the bounds; until it arrives, the memory holds anything."""
        whole = torch.as_strided(
            blocks.base, list(blocks.shape), list(blocks.strides), blocks.base.storage_offset()
        )
        assert place[-1] == 0 and all(x >= 0 for x in place) and blocks.dtype == into.dtype
        assert list(into.data.shape) == blocks.block_shape
        into.read_asynchronously()
        into.data.fill_(math.nan)

        def arrive() -> None:
            into.read_asynchronously()
            ends = zip(place, blocks.block_shape, whole.shape, strict=True)
            part = whole[tuple(slice(a, min(a + n, size)) for a, n, size in ends)]
            into.data.zero_()
            into.data[tuple(slice(0, n) for n in part.shape)] = part
            barrier.bytes -= into.data.nbytes
            if barrier.bytes < 0:
                raise Fault("more bytes arrive than a barrier expects")
            barrier.settle()

        BLOCK.copies.append(arrive)
        BLOCK.turn()


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
    """A product, in flight."""
    assert is_async
    product = Product(a, b, acc if use_acc else None)
    BLOCK.products.setdefault(BLOCK.running, []).append(product)
    return product


def warpgroup_mma_wait(num_outstanding: int, deps: list[Product]) -> Tensor:
    """The result of a product, which must not be among the youngest `num_outstanding`."""
    BLOCK.turn()
    mine = BLOCK.products[BLOCK.running]
    while len(mine) > num_outstanding:
        mine.pop(0).finish()
    (product,) = deps
    if product.result is None:
        raise Fault("a result is read before its product ends")
    return product.result


def fence_async_shared() -> None:
    """What this partition stored is seen by products and copies from here on."""
    for shared in BLOCK.memory:
        shared.unfenced[shared.unfenced == BLOCK.running + 1] = 0


def _allocate(dtype: Any, shape: list[int], layout: object) -> Any:
    if isinstance(layout, Mbarrier.MBarrierLayout):
        return Barrier() if len(shape) == 1 else Barriers([Barrier() for _ in range(shape[0])])
    shared = Shared(torch.full(shape, math.nan, dtype=dtype), torch.zeros(shape, dtype=torch.int8))
    BLOCK.memory.append(shared)
    return shared


class Barriers(list):
    """A row of barriers."""

    def index(self, i: int) -> Barrier:
        return self[i]


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    place = pointer.checked(mask)
    found = pointer.memory[place]
    if mask is not None:
        found = torch.where(torch.as_tensor(mask), found, torch.as_tensor(other).to(found.dtype))
    return found if found.ndim else found.item()


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    place, value = torch.broadcast_tensors(pointer.checked(mask), torch.as_tensor(value))
    where = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.expand_as(place)
    pointer.memory[place[where]] = value[where]


def _where(condition: Any, x: Any, y: Any) -> Any:
    return torch.where(condition, x, y) if isinstance(condition, Tensor) else x if condition else y


def _extreme(of_ints: Callable, of_tensors: Callable) -> Callable:
    def found(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return of_ints(x, y)
        return of_tensors(torch.as_tensor(x), torch.as_tensor(y))

    return found


def _reduced(how: str, neutral: float) -> Callable:
    def found(x: Tensor, axis: int) -> Any:
        if x.is_floating_point():
            x = torch.where(x.isnan(), neutral, x)  # as the hardware's, but for nothing but NaN
        y = getattr(x, how)(axis)
        return y if y.ndim else y.item()

    return found


def _sum(x: Tensor, axis: int) -> Any:
    y = x.sum(axis)
    return y if y.ndim else y.item()


def _layout(*arguments: object, **named: object) -> object:
    return None


GL = types.SimpleNamespace(
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int32", "int64")},
    constexpr=lambda x: x,
    program_id=lambda axis: BLOCK.program[axis],
    num_programs=lambda axis: BLOCK.grid[axis],
    allocate_shared_memory=_allocate,
    static_range=range,
    warp_specialize=lambda *given: BLOCK.specialise(*given),
    load=_load,
    store=_store,
    cast=lambda x, dtype, bitcast=False: x.view(dtype) if bitcast else x,
    arange=lambda low, high, layout: torch.arange(low, high),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    maximum=_extreme(max, torch.fmax),
    minimum=_extreme(min, torch.fmin),
    max=_reduced("amax", -math.inf),
    min=_reduced("amin", math.inf),
    sum=_sum,
    where=_where,
    exp2=torch.exp2,
    log2=torch.log2,
    convert_layout=lambda x, layout: x,
    **dict.fromkeys(
        ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), _layout
    ),
)


def source_of_kernel() -> str:
    """The text of its files."""
    return inspect.getsource(masks) + inspect.getsource(kernel)


def functions(source: str) -> dict[str, Any]:
    """What the source of the kernel defines, over stand-ins."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (
            isinstance(node, ast.ImportFrom)
            and str(node.module).startswith(("triton", "masks", "__future__"))
        )
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    found: dict[str, Any] = {"__package__": kernel.__package__, "gl": GL, "tma": Tma}
    found |= {"mbarrier": Mbarrier, "fence_async_shared": fence_async_shared}
    found |= {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    flag = __future__.annotations.compiler_flag
    exec(compile(tree, kernel.__file__, "exec", flags=flag), found)
    return found


class Launcher:
    """`attend[grid](...)`; blocks run one after the other."""

    def __init__(self, attend: Callable, seed: int) -> None:
        self._attend, self._seed = attend, seed
        self.programs = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments, **options: self._run(grid, arguments)

    def _run(self, grid: tuple[int, int, int], arguments: tuple) -> None:
        global BLOCK
        given = [
            Pointer.to(x) if isinstance(x, Tensor) else _described(x) if hasattr(x, "base") else x
            for x in arguments
        ]
        for b, x in itertools.product(range(grid[1]), range(grid[0])):
            BLOCK = Block((x, b), grid, random.Random(self._seed + self.programs))
            self._attend(*given)
            self.programs += 1


def pool(call: Call, work: Any) -> tuple[Tensor, Tensor]:
    """What the Triton kernel `pool` writes, which its interpreter takes a second for."""
    k, v, rows = call.k, call.v, call.rows
    batch, _, length, dim = k.shape
    pooled = torch.zeros(2, batch, work.pooled_rows, dim, dtype=k.dtype)
    cells = torch.zeros(3, batch, work.pooled_rows, dtype=torch.int32)
    cells[0] = torch.tensor(-math.inf).view(torch.int32)
    cells[1:] = torch.tensor([2**31 - 1, -1])[:, None, None]
    valid = [[0, length]] if rows is None else rows.valid(length, call.q.shape[2]).tolist()
    for (keys, offsets, count, first, head), b in itertools.product(
        work.slots.tolist(), range(batch)
    ):
        bounds = _at(offsets, count + 1)
        low, high = valid[b % len(valid)]
        for row, (start, stop) in enumerate(itertools.pairwise(bounds), first):
            tokens = [t for t in _at(keys, stop)[start:] if low <= t < high]
            if tokens:
                size = torch.tensor(float(len(tokens))).log2().view(torch.int32)
                cells[:, b, row] = torch.tensor([size, min(tokens), max(tokens)])
                pooled[:, b, row] = torch.stack(
                    [x[b, head, tokens].float().mean(0) for x in (k, v)]
                )
    return pooled, cells


def _at(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address))


def _described(blocks: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**vars(blocks), dtype=blocks.base.dtype)


@contextlib.contextmanager
def emulated(seed: int = 0, source: str | None = None) -> Iterator[Launcher]:
    """Inside, the Gluon backend takes CPU tensors, and its kernel runs here.

    Args:
        seed: Of the order in which partitions run and copies arrive.
        source: Instead of that of the kernel's files.
    """
    module = types.ModuleType("emulated")
    found = functions(source or source_of_kernel())
    module.attend = launcher = Launcher(found["attend"], seed)
    with (
        mock.patch.object(gluon, "_on_hopper", lambda device: True),
        mock.patch.object(launch, "kernel", module),
    ):
        yield launcher
