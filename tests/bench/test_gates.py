"""Gates judged on rows made by hand, and the report of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from bench.static.gates import GATES, Result, evaluate
from bench.static.report import markdown
from bench.static.shipped import Row
from tests.bench.rows import PRODUCT, STREAM, changed, full, stream


def failed(rows: Sequence[Row], archs: Sequence[str] = ("sm_90",)) -> list[Result]:
    return [result for result in evaluate(rows, archs, None) if not result.passed]


def test_rows_that_hold_every_gate() -> None:
    assert failed(full()) == []
    assert [result.gate for result in evaluate(full(), ["sm_90"], None)] == [
        gate.name for gate in GATES
    ]


@pytest.mark.parametrize(
    ("bad", "gate"),
    [
        (changed(spills=1), "no spill"),
        (changed(stack_bytes=8), "no spill"),
        (changed(tensor={}), "tensor cores"),
        (changed(ctas=0), "fits"),
        (dataclasses.replace(PRODUCT, name="bad", figures=None, error="PTXASError"), "compiles"),
    ],
)
def test_one_bad_launch_fails_what_every_launch_has_to_hold(bad: Row, gate: str) -> None:
    (result,) = failed([*full(), bad])
    assert gate in result.gate
    assert list(result.problems) == [bad.name]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"traffic": dataclasses.replace(STREAM, moved=1011)}, "bytes +1.1%"),
        ({"traffic": dataclasses.replace(STREAM, wide=False)}, "loads {128: 8}"),
        ({"traffic": None}, "it has a loop"),
    ],
)
def test_dequantise_has_to_stream(change: dict[str, Any], text: str) -> None:
    (result,) = failed([*full(), changed(stream(), **change)])
    assert result.gate.startswith("dequantise")
    assert text in result.problems["dequantize bad"]


@pytest.mark.parametrize("change", [{"loads": {64: 8}}, {"stores": {128: 8, 64: 1}}])
def test_on_amd_dequantise_has_to_be_wide(change: dict[str, Any]) -> None:
    usual = changed(stream("gfx942"), traffic=None)
    assert failed([*full("gfx942"), usual], ["gfx942"]) == []
    (result,) = failed([*full("gfx942"), changed(usual, **change)], ["gfx942"])
    assert result.gate.startswith("dequantise")


def test_a_kernel_that_is_not_shipped_is_not_met() -> None:
    (result,) = failed([PRODUCT])
    assert result.gate.startswith("dequantise")
    assert failed([]) == evaluate([], ["sm_90"], None)


def test_only_the_gates_of_the_kernels_asked_for() -> None:
    results = evaluate([PRODUCT], ["sm_90"], ["tail_forward"])
    assert [result.gate for result in results] == [g.name for g in GATES if not g.kernels]


def test_report() -> None:
    spilling = dataclasses.replace(changed(spills=3, registers=255), name="bad|name")
    rows = [*full(), spilling, *full("sm_100")]
    text = markdown(rows, evaluate(rows, ["sm_90", "sm_100"], None))
    assert "| no spill, no stack | **1 of 3 not** | all 2 |" in text
    assert "| bad/name | 3 spill instructions" in text  # a bar would end the cell
    assert (
        "| tail_forward | sm_90 | 2 | 255 | 3 | 32.0 | 2 | HMMA | 128 | 128 | alu 74%, mma 25% |"
    ) in text
    table = text.split("## Kernels")[1].splitlines()
    assert len({line.count("|") for line in table if line}) == 1
    assert len([line for line in table if line]) == 2 + 4
