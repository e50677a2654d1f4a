"""Inline assembly in interpreted kernels: packing, lanes of a warp, and what is refused."""

# Kernels annotate parameters tl.constexpr and are launched with plain values:
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.interpreter.inline_asm import PtxError
from tests.interpreter.memory import InvalidAccess
from tests.interpreter.ptx_operands import shuffle_origins

pytestmark = pytest.mark.usefixtures("guard")

LANE_TABLE = """{
    .reg .b32 lane; .reg .b64 address;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;   // two copies in a warp
    mad.wide.u32 address, lane, 4, $1;
    ld.global.nc.b32 $0, [address];
}"""
LOOK_UP = "shfl.sync.idx.b32 $0, $1, $3, 0x100f, 0xffffffff;"


@triton.jit
def assembly_kernel(
    x_ptr, out_ptr, N: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    DTYPES: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """One tensor in, one or two out, the second `N` elements behind the first."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if len(DTYPES) == 1:
        tl.store(
            out_ptr + i, tl.inline_asm_elementwise(ASM, CONSTRAINTS, [x], DTYPES[0], True, PACK)
        )
    else:
        first, second = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [x], DTYPES, True, PACK)
        tl.store(out_ptr + i, first)
        tl.store(out_ptr + N + i, second)


@triton.jit
def three_operand_kernel(a_ptr, b_ptr, c, out_ptr, N: tl.constexpr, ASM: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i)[:, None], tl.load(b_ptr + i)[None, :]
    out = tl.inline_asm_elementwise(ASM, "=f,f,f,f", [a, b, c], tl.float32, True, 1)
    tl.store(out_ptr + i[:, None] * N + i[None, :], out)


@triton.jit
def table_kernel(
    table_ptr, index_ptr, scale_ptr, out_ptr,
    TABLE: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    table = tl.inline_asm_elementwise(TABLE, "=r,l", [table_ptr.to(tl.int64)], tl.int32, True, 1)
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    index, scale = tl.load(index_ptr + at), tl.load(scale_ptr + i)[:, None]
    # The table is splatted to the shape of `scale` first, and then broadcast.
    out = tl.inline_asm_elementwise(ASM, "=f,r,f,r", [table, scale, index], tl.float32, True, 1)
    tl.store(out_ptr + at, out)


@triton.jit
def misuse_kernel(table_ptr, out_ptr, TABLE: tl.constexpr, OP: tl.constexpr):
    table = tl.inline_asm_elementwise(TABLE, "=r,l", [table_ptr.to(tl.int64)], tl.int32, True, 1)
    i = tl.arange(0, 16)
    if OP == "add":
        table += 1
    elif OP == "broadcast and add":
        table = i + table
    elif OP == "cast":
        table = table.to(tl.int64)
    elif OP == "assembly":
        table = tl.inline_asm_elementwise(
            "not.b32 $0, $1;", "=r,r", [table + i * 0], tl.int32, True, 1
        )
    tl.store(out_ptr + i, table)


@triton.jit
def element_lane_kernel(out_ptr, ASM: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, tl.inline_asm_elementwise(ASM, "=r,r", [i], tl.int32, True, 1))


def run(
    x: Tensor, dtypes: Sequence[torch.dtype], assembly: str, constraints: str, pack: int = 1
) -> Tensor:
    names = tuple(getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes)
    out = torch.empty(len(dtypes), len(x), dtype=dtypes[0])
    assembly_kernel[(1,)](x, out, len(x), assembly, constraints, names, pack)
    return out


def test_one_element_per_invocation() -> None:
    x = torch.randint(-(1 << 31), 1 << 31, (64,), dtype=torch.int32)
    assembly = "{ .reg .b32 t<2>; shr.u32 t0, $1, 4; and.b32 t1, t0, 0xF; mov.b32 $0, t1; }"
    assert torch.equal(run(x, [torch.int32], assembly, "=r,r")[0], x >> 4 & 15)


def test_two_outputs_in_registers_of_sixteen_bits() -> None:
    x = torch.randint(-(1 << 31), 1 << 31, (64,), dtype=torch.int32)
    out = run(x, [torch.bfloat16] * 2, "mov.b32 {$0, $1}, $2;", "=h,=h,r")
    assert torch.equal(out.view(torch.int16).T, x.view(torch.int16).view(-1, 2))


def test_bytes_are_packed_into_words() -> None:
    """Four bytes in one register, two times four results in four registers."""
    x = torch.randint(0, 256, (64,), dtype=torch.uint8)
    assembly = """{
        .reg .b32 low, high;
        and.b32 low, $4, 0x0f0f0f0f;
        shr.u32 high, $4, 4;
        and.b32 high, high, 0x0f0f0f0f;
        prmt.b32 $0, high, 0, 0x4140;
        prmt.b32 $1, high, 0, 0x4342;
        prmt.b32 $2, low, 0, 0x4140;
        prmt.b32 $3, low, 0, 0x4342;
    }"""
    out = run(x, [torch.int16] * 2, assembly, "=&r,=&r,=&r,=&r,r", pack=4)
    assert torch.equal(out, torch.stack([x >> 4, x & 15]).to(torch.int16))


def test_words_stay_apart_when_packed() -> None:
    x = torch.randn(64)
    swapped = run(x, [torch.float32], "mov.f32 $0, $3; mov.f32 $1, $2;", "=f,=f,f,f", pack=2)
    assert torch.equal(swapped[0].view(-1, 2), x.view(-1, 2).flip(1))


def test_sixty_four_bits() -> None:
    x = torch.randint(-(1 << 62), 1 << 62, (64,))
    out = run(x, [torch.int64], "{ .reg .s64 t; add.s64 t, $1, -1; mov.b64 $0, t; }", "=l,l")
    assert torch.equal(out[0], x - 1)


def test_bits_above_a_narrow_integer_are_undefined() -> None:
    x = torch.arange(64, dtype=torch.uint8)
    kept = run(x, [torch.int32], "and.b32 $0, $1, 0xff;", "=r,r")
    assert torch.equal(kept[0], x.int())
    assert (run(x, [torch.int32], "mov.b32 $0, $1;", "=r,r") != x.int()).all()


def test_operands_are_broadcast() -> None:
    a, b, out = torch.randn(16), torch.randn(16), torch.empty(16, 16)
    three_operand_kernel[(1,)](a, b, 2.5, out, 16, "fma.rn.f32 $0, $1, $2, $3;")
    exact = a.double()[:, None] * b.double() + 2.5
    assert torch.equal(out, exact.float())


def test_inner_blocks_have_registers_of_their_own() -> None:
    x = torch.arange(16, dtype=torch.int32)
    assembly = """{ .reg .b32 t; add.s32 t, $1, 1;
        { .reg .b32 t; add.s32 t, $1, 100; /* not the outer t */ }
        mov.b32 $0, t; }"""
    assert torch.equal(run(x, [torch.int32], assembly, "=r,r")[0], x + 1)


@pytest.mark.parametrize(("segments", "control"), [(1, 0x1F), (2, 0x100F), (4, 0x1807)])
def test_shuffle_by_index_stays_in_its_segment(segments: int, control: int) -> None:
    size = 32 // segments
    for lane in range(32):
        for wanted in range(32):
            expected = lane // size * size + wanted % size
            assert shuffle_origins(control)[wanted, lane] == expected


def test_shuffle_beyond_the_clamp_keeps_its_own_lane() -> None:
    origins = shuffle_origins(0x0007)
    assert origins[5].tolist() == [5] * 32
    assert origins[9].tolist() == list(range(32))


def test_a_table_with_an_entry_per_lane() -> None:
    table, scale = torch.randn(16), torch.randn(16)
    # shfl reads the low bits of the index only.
    index = torch.randint(-(1 << 31), 1 << 31, (16, 16), dtype=torch.int32)
    out = torch.empty(16, 16)
    assembly = f"{{ .reg .b32 v; {LOOK_UP.replace('$0', 'v')} mul.rn.f32 $0, v, $2; }}"
    table_kernel[(1,)](table, index, scale, out, LANE_TABLE, assembly, 16)
    assert torch.equal(out, table[index & 15] * scale[:, None])


def test_an_entry_that_differs_between_lanes_is_no_result() -> None:
    table, out = torch.randn(32), torch.empty(16, 16)
    index = torch.zeros(16, 16, dtype=torch.int32)
    whole = LANE_TABLE.replace("15", "31")  # each half of the warp gets another entry
    with pytest.raises(PtxError, match="differs between the lanes"):
        table_kernel[(1,)](table, index, table, out, whole, LOOK_UP, 16)
    table_kernel[(1,)](table, index, table, out, whole, LOOK_UP.replace("0x100f", "0x1f"), 16)
    assert torch.equal(out, table[0].expand(16, 16))


def test_a_table_is_read_in_bounds() -> None:
    index, out = torch.zeros(16, 16, dtype=torch.int32), torch.empty(16, 16)
    with pytest.raises(InvalidAccess, match="4 bytes past the end of table_ptr"):
        table_kernel[(1,)](torch.randn(15), index, torch.ones(16), out, LANE_TABLE, LOOK_UP, 16)


@pytest.mark.parametrize("operation", ["add", "broadcast and add", "cast", "assembly", "store"])
def test_a_table_has_no_other_use(operation: str) -> None:
    with pytest.raises(PtxError, match="differs between the lanes of a warp is used outside"):
        misuse_kernel[(1,)](torch.randn(16), torch.empty(16).int(), LANE_TABLE, operation)


def test_the_lane_of_an_element_is_unknown() -> None:
    out = torch.empty(16, dtype=torch.int32)
    with pytest.raises(PtxError, match="differs between the lanes"):
        element_lane_kernel[(1,)](out, "mov.u32 $0, %laneid;")
    with pytest.raises(PtxError, match="shuffles a value that differs between elements"):
        element_lane_kernel[(1,)](out, "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;")
    element_lane_kernel[(1,)](
        out, "{ .reg .b32 l; mov.u32 l, %laneid; shr.u32 l, l, 5; add.u32 $0, $1, l; }"
    )
    assert out.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("assembly", "constraints", "message"),
    [
        ("popc.b32 $0, $1;", "=r,r", "unknown instruction popc.b32"),
        ("mul.f32 $0, $1, $1;", "=r,r", "unknown instruction mul.f32"),
        ("@p mov.b32 $0, $1;", "=r,r", "unknown instruction @p"),
        ("mov.b32 $0, $1", "=r,r", "no semicolon"),
        ("mov.b32 $0, t;", "=r,r", "t is not declared, in `mov.b32 \\$0, t`"),
        (".reg .b32 t; mov.b32 $0, $1;", "=r,r", "outside of { }"),
        ("{ .reg .b32 t, t; mov.b32 $0, $1; }", "=r,r", "t is declared twice"),
        ("{ .reg .v4 t; mov.b32 $0, $1; }", "=r,r", "unknown register type .v4"),
        ("{ .reg .b32 t; mov.b32 $0, t; }", "=r,r", "t is read before it is written"),
        ("{ .reg .b32 t; } mov.b32 $0, t;", "=r,r", "t is not declared"),
        ("{ mov.b32 $0, $1;", "=r,r", "a { without its }"),
        ("mov.b32 $0, $1; }", "=r,r", "a } too many"),
        ("mov.b64 $0, $1;", "=r,r", "\\$1 has 32 bits where 64 are needed"),
        ("and.b32 $0, $1;", "=r,r", "2 operands where 3 belong"),
        ("and.b32 $0, $1, 0x1ffffffff;", "=r,r", "0x1ffffffff does not fit in 32 bits"),
        ("and.b32 $0, $1, 017;", "=r,r", "017 is neither a register nor a literal"),
        ("mov.f32 $0, 0f3F80;", "=r,r", "0f3F80 is neither"),
        ("add.u32 $1, $1, 1;", "=r,r", "the input \\$1 is overwritten"),
        ("{ .reg .b32 t; mov.b32 t, $1; }", "=r,r", "output \\$0 is never written"),
        ("mov.b32 $0, $1;", "=r,~{memory}", "unknown constraint '~{memory}'"),
        ("mov.b32 $0, $1;", "r,=r", "an output after an input"),
        ("mov.b32 $0, $1;", "=r,r,r", "1 operand registers, 2 constraints"),
        ("mov.b32 $0, $1;", "=r", "more operand registers than the 0"),
        ("mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", "2 output registers, 1 used"),
        ("cvt.u16.u32 $0, $1;", "=h,r", "1 × int32 in a register of 16 bits"),
        ("{ .reg .b16 h; cvt.u16.u32 h, $1; mov.b32 $0, {h, h, h}; }", "=r,r", "3 parts"),
        ("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffff;", "=r,r", "only shuffles of the whole"),
        ("ld.global.nc.b32 $0, $1;", "=r,r", "\\$1 is not an address"),
    ],
)
def test_refused(assembly: str, constraints: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(torch.arange(16, dtype=torch.int32), [torch.int32], assembly, constraints)


def test_operands_must_fit_their_registers() -> None:
    with pytest.raises(PtxError, match="an operand of 16 bits in a register of 32"):
        run(torch.randn(16).half(), [torch.int32], "mov.b32 $0, $1;", "=r,r")
    with pytest.raises(PtxError, match="an operand of 64 bits in a register of 32"):
        run(torch.arange(16), [torch.int32], "mov.b32 $0, $1;", "=r,r")
    with pytest.raises(PtxError, match="2 elements do not divide into invocations of 4"):
        run(torch.arange(2).to(torch.uint8), [torch.uint8], "mov.b32 $0, $1;", "=r,r", pack=4)


def test_fma_rounds_once_where_two_roundings_would_err() -> None:
    x = torch.full((16,), 1 + 2.0**-12)
    fused = run(x, [torch.float32], "fma.rn.f32 $0, $1, $1, 0fBF800000;", "=f,f")[0]
    assert fused[0].item() == np.float64(1 + 2.0**-12) ** 2 - 1
    assert not torch.equal(fused, x * x - 1)
