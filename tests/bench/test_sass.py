"""The parser of cuobjdump's text, and the decoding of the control word."""

import pytest

from bench.static.sass import DisassemblyError, parse

TEXT = """
\tcode for sm_90a
\t\tFunction : kernel
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x{first:016x} */
        /*0010*/             @!P0  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ; /* 0x1 */
                                                                           /* 0x{second:016x} */
        /*0020*/                   BRA 0x10;                            /* 0xfffffffc00fc7947 */
                                                                           /* 0x{third:016x} */
\t\t..........
"""


def control_word(*, stall: int, write: int, read: int, wait: int) -> int:
    """The upper half of an encoding; the lower 41 bits belong to the instruction itself."""
    fields = stall | 1 << 4 | write << 5 | read << 8 | wait << 11
    return fields << 41 | 0x1FF_FFFF_FFFF


def text(**words: int) -> str:
    return TEXT.replace("/* 0x1 */", "/* 0x0000000000000001 */").format(**words)


def test_fields_of_the_control_word() -> None:
    first = {"stall": 15, "write": 0, "read": 7, "wait": 0}
    second = {"stall": 1, "write": 7, "read": 5, "wait": 0b100001}
    third = {"stall": 0, "write": 7, "read": 7, "wait": 0b111111}
    words = zip(("first", "second", "third"), (first, second, third), strict=True)
    code = parse(text(**{name: control_word(**fields) for name, fields in words}))
    for instruction, fields in zip(code, (first, second, third), strict=True):
        found = {name: getattr(instruction, name) for name in fields}
        assert found == fields, instruction


def test_operands_predicates_and_branches() -> None:
    load, multiply, branch = parse(text(first=0, second=0, third=0))
    assert (load.address, load.opcode, load.operands) == (0, "LDC", "R1, c[0x0][0x28]")
    assert (load.predicate, load.conditional, load.branch_target) == ("", False, None)
    assert multiply.predicate == "!P0"
    assert multiply.opcode == "HGMMA.64x128x16.F32.BF16"
    assert multiply.base == "HGMMA"
    assert (branch.branch_target, branch.conditional) == (0x10, False)


def test_text_without_instructions() -> None:
    with pytest.raises(DisassemblyError, match="no complete instruction"):
        parse("code for sm_90a\n")


def test_instruction_without_control_word() -> None:
    lines = text(first=0, second=0, third=0).splitlines()
    del lines[5]
    with pytest.raises(DisassemblyError, match=r"no control word after .*LDC"):
        parse("\n".join(lines))
