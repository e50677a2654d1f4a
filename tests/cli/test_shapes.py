"""Shapes on the command line."""

import pytest

from qlora_compile.cli.errors import ShapeError
from qlora_compile.cli.shapes import parse_shapes
from qlora_compile.cli.training_problems import problems_of_shapes


def test_every_item_is_four_numbers() -> None:
    assert parse_shapes("4096x1024x2048x16") == [(4096, (1024,), 2048, 16)]
    assert parse_shapes("1x2x3x0, 5X6X7X8") == [(1, (2,), 3, 0), (5, (6,), 7, 8)]
    assert parse_shapes("16x3+2x4x1") == [(16, (3, 2), 4, 1)]


@pytest.mark.parametrize(
    ("text", "item", "problem"),
    [
        ("", "''", "is not four whole numbers"),
        ("1x2x3x4,", "''", "is not four whole numbers"),
        ("1x2x3x4,1x2x3", "'1x2x3'", "is not four whole numbers"),
        ("1x2x3x4x5", "'1x2x3x4x5'", "is not four whole numbers"),
        ("1x2x-3x4", "'1x2x-3x4'", "is not four whole numbers"),
        ("1x2x3.0x4", "'1x2x3.0x4'", "is not four whole numbers"),
        ("1x2x٣x4", "'1x2x٣x4'", "is not four whole numbers"),
        ("1x0x3x4", "'1x0x3x4'", "has a dimension of zero"),
    ],
)
def test_the_bad_item_is_named(text: str, item: str, problem: str) -> None:
    with pytest.raises(ShapeError) as raised:
        parse_shapes(text)
    assert f"--shapes: {item} {problem}; write MxNxKxR" in str(raised.value)


def test_options_of_the_format_stand_in_the_problems() -> None:
    text = "int4:group_size=128,zeros=float,refine=true"
    problems = problems_of_shapes([(16, (24,), 256, 4)], text, dropout=False)
    found = {str(problem.layout) for problem in problems}
    assert found == {"int4[24x256] group_size=128 scales=bfloat16 zeros=float"}
