"""The parser of cuobjdump's text, and loops in it."""

import pytest

from bench.static.sass import DisassemblyError, has_loop, parse
from tests.bench.sass_text import program

TEXT = """
\tcode for sm_90a
\t\tFunction : kernel
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe200000000ff */
        /*0010*/             @!P0  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ; /* 0x1 */
                                                                           /* 0x000fe200000000ff */
        /*0020*/                   BRA 0x10;                            /* 0xfffffffc00fc7947 */
                                                                           /* 0x000fe200000000ff */
\t\t..........
"""


def test_addresses_opcodes_and_operands() -> None:
    load, multiply, branch = parse(TEXT)
    assert (load.address, load.opcode, load.operands) == (0, "LDC", "R1, c[0x0][0x28]")
    assert (multiply.address, multiply.opcode) == (0x10, "HGMMA.64x128x16.F32.BF16")
    assert (multiply.base, multiply.modifiers) == ("HGMMA", ["64x128x16", "F32", "BF16"])
    assert (branch.opcode, branch.operands) == ("BRA", "0x10")


def test_text_without_instructions() -> None:
    with pytest.raises(DisassemblyError, match="no instruction"):
        parse("code for sm_90a\n")


@pytest.mark.parametrize(
    ("lines", "loops"),
    [
        (["S2R R0, SR_TID.X", "BRA 0x20", "EXIT", "BRA 0x30", "NOP"], False),
        (["MOV R0, RZ", "FADD R0, R0, R1", "BRA 0x10", "EXIT"], True),
        (["MOV R0, RZ", "FADD R0, R0, R1", "BRA P1, 0x10", "EXIT"], True),
    ],
    ids=["forward and to itself", "back", "back under a predicate"],
)
def test_a_loop_is_a_branch_back(lines: list[str], loops: bool) -> None:
    assert has_loop(program(*lines)) == loops
