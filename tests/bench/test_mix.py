"""Instruction classes, multiply-accumulates, access widths, registers by name."""

import pytest

from bench.static.mix import access_bits, instruction_class, macs, mix
from bench.static.operands import reads, writes
from tests.bench.sass_text import instruction, program


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", "mma"),
        ("HGMMA.64x128x16.F32.BF16", "wgmma"),
        ("UTCHMMA", "tcgen05"),
        ("UTCQMMA.2CTA", "tcgen05"),
        ("LDGSTS.E.BYPASS.128", "asynchronous copy"),
        ("UTMALDG.2D", "bulk copy"),
        ("LDL.LU", "spill"),
        ("SHFL.IDX", "shuffle"),
        ("F2FP.BF16.F32.PACK_AB", "float pack"),
        ("HFMA2.BF16_V2", "half pair"),
        ("PRMT", "alu"),
        ("UIADD3", "uniform"),
        ("R2UR", "control"),
    ],
)
def test_class_of_an_opcode(opcode: str, expected: str) -> None:
    assert instruction_class(opcode) == expected


def test_mix_counts_classes() -> None:
    code = program("PRMT R0, R1, R2, R3", "LOP3.LUT R0, R1, R2, R3, 0xc0, !PT", "FMUL R0, R1, R2")
    assert mix(code) == {"alu": 2, "float": 1}


@pytest.mark.parametrize(
    ("text", "warps", "expected"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 4, 4 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 1, 16 * 8 * 8),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", 8, 2 * 64 * 256 * 16),
        ("FFMA R0, R1, R2, R3", 8, 0),
    ],
)
def test_multiply_accumulates(text: str, warps: int, expected: int) -> None:
    assert macs(instruction(text), warps) == expected


def test_unknown_tensor_core_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tensor-core shape"):
        macs(instruction("HMMA.9999.F32 R4, R8, R12, R4"), 4)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", 128),
        ("LDG.E.U8 R4, [R2.64]", 8),
        ("LDG.E R4, [R2.64]", 32),
        ("STG.E.64 [R2.64], R4", 64),
        ("LDSM.16.M88.4 R4, [R2]", 128),
        ("LDSM.16.MT88.2 R4, [R2]", 64),
    ],
)
def test_access_width(text: str, bits: int) -> None:
    assert access_bits(instruction(text)) == bits


def named(kind: str, first: int, count: int) -> set[str]:
    return {f"{kind}{number}" for number in range(first, first + count)}


@pytest.mark.parametrize(
    ("text", "results", "sources"),
    [
        ("FADD R1, R2, -R3", {"R1"}, {"R2", "R3"}),
        ("@!P2 MOV R1, RZ", {"R1"}, {"P2"}),
        ("ISETP.GE.AND P0, PT, R1, R2, P3", {"P0"}, {"R1", "R2", "P3"}),
        ("IADD3 R4, P0, R2, R3, RZ", {"R4", "P0"}, {"R2", "R3"}),
        ("LEA.HI.X R5, R2, R3, R4, 0x2, P0", {"R5"}, {"R2", "R3", "R4", "P0"}),
        ("IMAD.WIDE R2, R4, 0x4, R6", {"R2", "R3"}, {"R4", "R6", "R7"}),
        ("SHFL.IDX PT, R5, R6, R7, 0x100f", {"R5"}, {"R6", "R7"}),
        ("LOP3.LUT P1, R5, R6, 0x1, RZ, 0xc0, !PT", {"P1", "R5"}, {"R6"}),
        ("LDG.E.128 R4, desc[UR4][R2.64+0x10]", named("R", 4, 4), {"UR4", "R2", "R3"}),
        ("STG.E.128 desc[UR4][R2.64], R8", set(), {"UR4", "R2", "R3"} | named("R", 8, 4)),
        ("STS.64 [R2+UR5+0x8], R8", set(), {"R2", "UR5", "R8", "R9"}),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64], P0", set(), {"R2", "R4", "R5", "P0"}),
        ("LDSM.16.M88.4 R4, [R2+0x80]", named("R", 4, 4), {"R2"}),
        (
            "HMMA.16816.F32.BF16 R4, R8, R12, R16",
            named("R", 4, 4),
            named("R", 8, 4) | named("R", 12, 2) | named("R", 16, 4),
        ),
        (
            "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0",
            named("R", 24, 8),
            named("R", 4, 4) | {"UR8"} | named("R", 24, 8),
        ),
        ("FCHK P0, R87, 127", {"P0"}, {"R87"}),
        ("R2UR UR4, R5", {"UR4"}, {"R5"}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", set(), set()),
        ("BRA.U UP0, 0x40", set(), {"UP0"}),
    ],
)
def test_registers(text: str, results: set[str], sources: set[str]) -> None:
    assert (writes(instruction(text)), reads(instruction(text))) == (results, sources)
