"""Thinned ranges: every two values meet, in fewer rows."""

from itertools import combinations, product

from tests.pairwise import pairwise


def test_every_two_values_meet() -> None:
    rows = [row for row in product("abc", "xyz", range(4), (False, True)) if row[:2] != ("a", "x")]
    chosen = pairwise(rows, lambda row: dict(zip("abcd", row, strict=True)))
    assert len(chosen) < len(rows) / 3
    for first, second in combinations(range(4), 2):
        met = {(row[first], row[second]) for row in chosen}
        assert met == {(row[first], row[second]) for row in rows}


def test_values_of_different_functions_need_not_meet() -> None:
    rows = list(product(range(5), range(5), range(5), range(5)))
    apart = pairwise(
        rows,
        lambda row: {"a": row[0], "b": row[1]},
        lambda row: {"c": row[2], "d": row[3]},
    )
    assert len({row[:2] for row in apart}) == len({row[2:] for row in apart}) == 25
    assert len(apart) == 25
