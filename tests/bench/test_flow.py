"""Loops and the usual path, on programs written by hand."""

from collections.abc import Sequence

from bench.static.flow import innermost_loops, natural_loops, path
from bench.static.sass import Instruction
from bench.static.utilization import tensor_weight
from tests.bench.sass_text import program


def longest(code: Sequence[Instruction]) -> tuple[int, ...]:
    return (len(code),)


def opcodes(code: Sequence[Instruction]) -> list[str]:
    return [instruction.base for instruction in code]


def test_straight_code_is_all_before() -> None:
    route = path(program("S2R R0, SR_TID.X", "STG [R2], R0", "EXIT", "BRA 0x30", "NOP"), longest)
    assert opcodes(route.before) == ["S2R", "STG", "EXIT"]
    assert (route.loop, route.after) == ((), ())


def test_loop_closed_by_a_conditional_branch() -> None:
    code = program(
        "MOV R0, RZ", "@!P0 BRA 0x40", "IADD3 R0, R0, 0x1, RZ", "@P1 BRA 0x20", "STG [R2], R0",
        "EXIT",
    )  # fmt: skip
    assert natural_loops(code) == [(2, frozenset({2, 3}))]
    route = path(code, longest)
    assert opcodes(route.before) == ["MOV", "BRA"]
    assert opcodes(route.loop) == ["IADD3", "BRA"]
    assert opcodes(route.after) == ["STG", "EXIT"]
    assert len(route.unrolled(3)) == 2 + 3 * 2 + 2


def test_loop_left_by_a_call_that_never_returns() -> None:
    code = program(
        "MOV R0, RZ", "FADD R0, R0, R1", "@!P0 CALL.REL.NOINC 0x40", "BRA 0x10", "STG [R2], R0",
        "EXIT",
    )  # fmt: skip
    route = path(code, longest)
    assert opcodes(route.loop) == ["FADD", "CALL", "BRA"]
    assert opcodes(route.after) == ["STG", "EXIT"]


def test_retry_placed_after_the_end_belongs_to_its_loop_and_is_not_walked() -> None:
    code = program(
        "MOV R0, RZ",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",  # 0x10, the loop's header
        "@!P0 BRA 0x60",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0",
        "@P1 BRA 0x10",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",  # 0x60, retries
        "@!P0 BRA 0x60",
        "BRA 0x30",
    )
    route = path(code, tensor_weight)
    assert opcodes(route.loop) == ["SYNCS", "BRA", "HGMMA", "BRA"]
    assert opcodes(route.after) == ["EXIT"]
    loops = dict(innermost_loops(code))
    assert loops[1] == frozenset({1, 2, 3, 4, 6, 7, 8})


def test_the_main_loop_is_the_one_that_multiplies() -> None:
    code = program(
        "MOV R0, RZ",
        *["FADD R1, R1, R2"] * 9,
        "@P0 BRA 0x10",  # 0xa0
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0xb0
        "@P1 BRA 0xb0",
        "EXIT",
    )
    assert opcodes(path(code, tensor_weight).loop) == ["HMMA", "BRA"]
    assert opcodes(path(code, longest).loop) == ["FADD"] * 9 + ["BRA"]


def test_of_nested_loops_the_inner_one() -> None:
    code = program(
        "MOV R0, RZ", "FADD R1, R1, R2", "FMUL R1, R1, R2", "@P0 BRA 0x20", "@P1 BRA 0x10", "EXIT"
    )
    assert [header for header, _ in natural_loops(code)] == [1, 2]
    assert innermost_loops(code) == [(2, frozenset({2, 3}))]


def test_a_branch_is_taken_where_only_its_target_multiplies() -> None:
    code = program(
        "MOV R0, RZ",
        "@P0 BRA 0x80",
        "MOV R1, RZ",
        "FADD R1, R1, R2",  # 0x30, the loop's header
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P1 BRA 0x30",
        "STG [R2], R0",
        "EXIT",
        "HMMA.16816.F32.BF16 R16, R8, R12, R16",  # 0x80, the adapter's product out of line
        "BRA 0x30",
    )
    route = path(code, tensor_weight)
    assert opcodes(route.before) == ["MOV", "BRA", "HMMA", "BRA"]
    assert opcodes(route.loop) == ["FADD", "HMMA", "BRA"]
    assert opcodes(route.after) == ["STG", "EXIT"]
