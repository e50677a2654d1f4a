"""Instruction classes and access widths."""

import pytest

from bench.static.mix import access_bits, instruction_class
from tests.bench.sass_text import program


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
    (instruction,) = program(text)
    assert access_bits(instruction) == bits
