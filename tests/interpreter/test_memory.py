"""Accesses outside of the tensors of a launch are noticed, accesses inside are not."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false

from __future__ import annotations

import itertools
import operator
import re

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interpreter.memory import InvalidAccess, MemoryGuard, Region

pytestmark = pytest.mark.usefixtures("guard")


@triton.jit
def copy_kernel(x_ptr, out_ptr, start, stop, N: tl.constexpr):
    i = tl.arange(0, N) + start
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < stop, other=0), mask=i < stop)


@triton.jit
def scalar_kernel(x_ptr, out_ptr, at):
    tl.store(out_ptr, tl.load(x_ptr + at))


@triton.jit
def rows_kernel(x_ptr, out_ptr, stride, columns, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    mask = (n < columns) & (m >= 0)
    x = tl.load(x_ptr + m * stride + n, mask=mask, other=0.0)
    tl.store(out_ptr + m * N + n, x)


@triton.jit
def from_one_to_another_kernel(x_ptr, out_ptr, distance, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + distance + i))


@triton.jit
def words_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + i))


@triton.jit
def pointer_table_kernel(table_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def chosen_kernel(x_ptr, y_ptr, out_ptr, n, N: tl.constexpr):
    """Both pointers in one load."""
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(tl.where(i < n, x_ptr + i, y_ptr + i)))


@triton.jit
def atomic_kernel(x_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    if OP == "add":
        tl.atomic_add(x_ptr + i, 1.0)
    elif OP == "masked add":
        tl.atomic_add(x_ptr + i, 1.0, mask=i < 4)
    elif OP == "compare":
        tl.atomic_cas(x_ptr + i, i, i)


@triton.jit
def descriptor_kernel(descriptor, out_ptr, row, M: tl.constexpr, N: tl.constexpr, STORE: tl.constexpr):  # fmt: skip # noqa: E501
    x = descriptor.load([row, 0])
    if STORE:
        descriptor.store([row, 0], x + 1)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], x)


@triton.jit
def unmasked_other_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))


def test_a_ragged_end_behind_a_mask_is_inside() -> None:
    x, out = torch.randn(13), torch.zeros(13)
    copy_kernel[(1,)](x, out, 0, 13, 16)
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (
            0,
            14,
            "load of 4 bytes at 0x[0-9a-f]+ is 4 bytes past the end of x_ptr \\[13\\]; 1 of 14",
        ),
        (-2, 13, "load of 4 bytes at 0x[0-9a-f]+ is 8 bytes before the start of x_ptr"),
    ],
)
def test_loads_outside(start: int, stop: int, message: str) -> None:
    with pytest.raises(InvalidAccess, match=message + ".*in program \\(0, 0, 0\\) of copy_kernel"):
        copy_kernel[(1,)](torch.randn(13), torch.zeros(16), start, stop, 16)


def test_stores_outside() -> None:
    with pytest.raises(
        InvalidAccess, match=r"store .* 4 bytes past the end of out_ptr \[13\]; 3 of"
    ):
        copy_kernel[(1,)](torch.randn(16), torch.zeros(13), 0, 16, 16)


def test_scalars_outside() -> None:
    out = torch.zeros(1)
    scalar_kernel[(1,)](torch.tensor([1.0, 2.0]), out, 1)
    assert out == 2
    with pytest.raises(InvalidAccess, match="load"):
        scalar_kernel[(1,)](torch.tensor([1.0, 2.0]), out, 2)
    with pytest.raises(InvalidAccess, match="x_ptr \\[0\\]"):
        scalar_kernel[(1,)](torch.empty(0), out, 0)


def test_the_gap_between_rows_is_outside() -> None:
    whole = torch.randn(8, 16)
    view, out = whole[:, :12], torch.zeros(8, 16)
    rows_kernel[(1,)](view, out, 16, 12, 8, 16)
    assert torch.equal(out[:, :12], view)
    with pytest.raises(InvalidAccess, match="48 bytes after the start, between rows, of x_ptr"):
        rows_kernel[(1,)](view, out, 16, 13, 8, 16)
    rows_kernel[(1,)](whole, out, 16, 16, 8, 16)
    assert torch.equal(out, whole)


def test_another_tensor_of_the_launch_is_outside() -> None:
    buffer = torch.randn(32)
    x, out = buffer[:16], buffer[16:]
    with pytest.raises(InvalidAccess, match="x_ptr"):
        from_one_to_another_kernel[(1,)](x, out, 16, 16)


def test_alignment() -> None:
    codes, out = torch.arange(17, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)
    words_kernel[(1,)](codes[:16], out, 4)
    assert out[0] == 0x03020100
    with pytest.raises(InvalidAccess, match="which is not a multiple of 4"):
        words_kernel[(1,)](codes[1:], out, 4)
    with pytest.raises(InvalidAccess, match="past the end"):
        words_kernel[(1,)](codes[:15], out, 4)


def test_addresses_from_a_table_need_permission(guard: MemoryGuard) -> None:
    x, out = torch.randn(8), torch.zeros(8)
    table = torch.tensor([x.data_ptr()])
    with pytest.raises(InvalidAccess, match=r"past the end|before the start"):
        pointer_table_kernel[(1,)](table, out, 8)
    guard.allow(x[:7], "seven elements")
    with pytest.raises(InvalidAccess, match="4 bytes past the end of seven elements"):
        pointer_table_kernel[(1,)](table, out, 8)
    guard.allow(x)
    pointer_table_kernel[(1,)](table, out, 8)
    assert torch.equal(out, x)


def test_one_load_from_two_tensors() -> None:
    x, y, out = torch.randn(5), torch.randn(8), torch.zeros(8)
    chosen_kernel[(1,)](x, y, out, 5, 8)
    assert torch.equal(out, torch.cat([x, y[5:]]))
    with pytest.raises(InvalidAccess, match="x_ptr"):
        chosen_kernel[(1,)](x, y, out, 6, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_atomics(dtype: torch.dtype) -> None:
    x = torch.zeros(7, dtype=dtype)
    atomic_kernel[(1,)](x, 8, "masked add")
    assert x.tolist() == [1] * 4 + [0] * 3
    with pytest.raises(InvalidAccess, match="atomic of"):
        atomic_kernel[(1,)](x, 8, "add")
    with pytest.raises(InvalidAccess, match="atomic of 4"):
        atomic_kernel[(1,)](torch.zeros(7, dtype=torch.int32), 8, "compare")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_descriptors_pad_ragged_edges(dtype: torch.dtype, padding: str) -> None:
    x = torch.randn(5, 24).to(dtype)
    before = x.clone()
    descriptor = TensorDescriptor.from_tensor(x, [4, 32], padding)
    out = torch.empty(4, 32, dtype=dtype)
    descriptor_kernel[(1,)](descriptor, out, 3, 4, 32, True)
    assert torch.equal(out[:2, :24], before[3:])
    outside = torch.cat([out[2:].flatten(), out[:2, 24:].flatten()])
    assert outside.isnan().all() if padding == "nan" else not outside.any()
    assert torch.equal(x, torch.cat([before[:3], before[3:] + 1]))


def test_descriptors_larger_than_their_tensor() -> None:
    x, out = torch.randn(5, 8), torch.empty(8, 8)
    descriptor = TensorDescriptor(x, [8, 8], [8, 1], [8, 8])
    with pytest.raises(InvalidAccess, match="past the end of descriptor"):
        descriptor_kernel[(1,)](descriptor, out, 0, 8, 8, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masked_off_floats_without_other_are_nan(dtype: torch.dtype) -> None:
    x, out = torch.randn(8).to(dtype), torch.empty(8, dtype=dtype)
    unmasked_other_kernel[(1,)](x, out, 5, 8)
    assert torch.equal(out[:5], x[:5])
    assert out[5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_masked_off_integers_without_other_are_the_largest(dtype: torch.dtype) -> None:
    x, out = torch.arange(8).to(dtype), torch.empty(8, dtype=dtype)
    unmasked_other_kernel[(1,)](x, out, 5, 8)
    assert out.tolist() == [0, 1, 2, 3, 4] + [torch.iinfo(dtype).max] * 3


@given(
    sizes=st.lists(st.integers(1, 4), max_size=3),
    steps=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    offset=st.integers(0, 5),
    width=st.sampled_from([1, 2, 4, 8]),
)
def test_regions_of_strided_views(
    sizes: list[int], steps: list[int], order: list[int], offset: int, width: int
) -> None:
    """Inside is what a set of the elements' bytes holds."""
    storage = torch.zeros(2000, dtype=torch.int16)
    padded = [size * step for size, step in zip(sizes, steps, strict=False)]
    count = torch.Size(padded).numel()
    view = storage[offset : offset + count].view(padded)
    view = view[tuple(slice(None, size) for size in sizes)]
    view = view.permute([axis for axis in order if axis < len(sizes)])
    held = {
        address + byte
        for index in itertools.product(*map(range, view.shape))
        for address in [view.data_ptr() + 2 * sum(map(operator.mul, index, view.stride()))]
        for byte in range(2)
    }
    first = storage.data_ptr()
    addresses = torch.arange(first, first + 2 * (offset + count) + 8).to(torch.uint64).numpy()
    wrong = Region.of(view, "view").outside(addresses, width)
    for address, is_wrong in zip(addresses.tolist(), wrong.tolist(), strict=True):
        assert is_wrong == (not held.issuperset(range(address, address + width)))


def test_overlapping_views_are_known_by_their_span() -> None:
    region = Region.of(torch.zeros(16).as_strided((4, 4), (1, 2)), "overlapping")
    assert (region.end - region.start, region.outer) == (40, ())
    assert re.match("4 bytes past", region.distance(region.end, 4))
