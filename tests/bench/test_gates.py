"""Gates judged on rows made by hand, and the report of them."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest

from bench.static.gates import GATES, Result, evaluate
from bench.static.memory import Bound, Traffic
from bench.static.report import as_json, markdown
from bench.static.selection import best, fastest, l2_need, output_cycles
from bench.static.shipped import Row
from bench.static.sm_table import Card
from tests.bench.rows import ROW, STREAM, Changes, changed, full


def failed(rows: Sequence[Row], archs: Sequence[str] = ("sm_90",)) -> list[Result]:
    return [result for result in evaluate(rows, archs, None) if not result.verdict.passed]


def test_rows_that_hold_every_gate() -> None:
    assert failed(full()) == []
    assert {result.gate for result in evaluate(full(), ["sm_90"], None)} == {
        gate.name for gate in GATES
    }


@pytest.mark.parametrize(
    ("bad", "gate"),
    [
        (changed(config="bad", taken={"spills": 1}), "zero spills"),
        (changed(config="bad", taken={"stack_bytes": 8}), "zero spills"),
        (changed(config="bad", taken={"tensor": {}}), "tensor cores"),
        (changed(config="bad", figures={"ctas": 0}), "fits on an SM"),
        (changed(config="bad", figures={"unguarded": 1}), "control words agree"),
    ],
)
def test_one_bad_launch_fails_what_every_launch_has_to_hold(bad: Row, gate: str) -> None:
    (result,) = failed([*full(), bad])
    assert result.gate == gate
    assert "bad" in result.verdict.launch


def test_a_launch_that_does_not_compile() -> None:
    broken = dataclasses.replace(ROW, figures=None, error="PTXASError: no", config="broken")
    (result,) = failed([*full(), broken])
    assert (result.gate, result.verdict.value) == ("compiles", "PTXASError: no")


def replaced(rows: Sequence[Row], kernel: str, ranks: Sequence[int], **changes: Any) -> list[Row]:
    return [
        changed(row, **changes) if row.kernel == kernel and row.rank in ranks else row
        for row in rows
    ]


@pytest.mark.parametrize(
    ("kernel", "changes", "gates"),
    [
        (
            "fused_backward",
            {"use": {"tensor": 0.93}},
            {"fused dX near forward, modelled utilization"},
        ),
        ("tail_forward", {"use": {"tensor": 0.94}}, {"tail forward, modelled utilization"}),
        (
            "tail_backward",
            {"use": {"tensor": 0.90}},
            {"tail dX near forward, modelled utilization"},
        ),
        (
            "fused_forward",
            {"figures": {"decode": {"alu": 30.0, "shuffle": 2.5}}},
            {"instructions per 8 decoded weights"},
        ),
    ],
)
def test_the_best_launch_has_to_hold_the_rest(
    kernel: str, changes: Changes, gates: set[str]
) -> None:
    rows = replaced(full(), kernel, (0, 16, 64), **changes)
    assert {result.gate for result in failed(rows)} == gates


def test_the_forward_limit_differs_by_architecture() -> None:
    for arch, least in (("sm_80", 0.85), ("sm_89", 0.95), ("sm_90", 0.80), ("sm_120", 0.95)):
        for use, bad in ((least, False), (least - 0.01, True)):
            rows = full(arch)
            for kernel in ("fused_forward", "fused_backward"):
                rows = replaced(rows, kernel, (0, 16, 64), use={"tensor": use})
            names = {result.gate for result in failed(rows, [arch])}
            assert ("fused forward, modelled utilization" in names) == bad, (arch, use)


def test_the_adapter_costs_at_most_a_twentieth() -> None:
    whole = 5000 + 64 * 1000
    for overhead, bad in ((5000 + 0.04 * whole, False), (5000 + 0.06 * whole, True)):
        rows = replaced(full(), "tail_forward", (64,), use={"overhead": overhead})
        names = {result.gate for result in failed(rows)}
        assert ("adapter of rank 64, tail_forward, modelled time" in names) == bad


def test_a_doubly_quantised_weight_has_a_cost_of_its_own() -> None:
    double = [
        changed(kernel="fused_forward", double_quantized=True, rank=rank, use={"period": period})
        for rank, period in ((0, 1000.0), (16, 1100.0))
    ]
    (result,) = failed([*full(), *double])
    assert result.gate == "adapter of rank 16, fused_forward, modelled time"
    assert "double" in result.verdict.launch


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (dataclasses.replace(STREAM, moved=1011), "bytes +1.1%"),
        (dataclasses.replace(STREAM, wide=False), "loads {128: 8}"),
        (dataclasses.replace(STREAM, bounds={"B200": Bound(21.0, 20.0)}), "B200: SM 21"),
        (None, "it has a loop"),
    ],
)
def test_dequantise_has_to_stream(stream: Traffic | None, text: str) -> None:
    (result,) = failed(replaced(full(), "dequantize", (16,), figures={"traffic": stream}))
    assert result.gate == "dequantise streams"
    assert text in result.verdict.value


def test_a_kernel_that_is_not_shipped_is_not_met() -> None:
    rows = [row for row in full() if not row.kernel.startswith("tail")]
    gates = {result.gate for result in failed(rows)}
    assert "tail forward, modelled utilization" in gates
    assert "adapter of rank 16, tail_backward, modelled time" in gates
    assert failed([]) == evaluate([], ["sm_90"], None)


def test_only_the_gates_of_the_kernels_asked_for() -> None:
    rows = [row for row in full() if row.kernel == "dequantize"]
    results = evaluate(rows, ["sm_90"], ["dequantize"])
    assert "dequantise streams" in {result.gate for result in results}
    assert not {gate for gate in (result.gate for result in results) if "tail" in gate}


def test_the_best_launch() -> None:
    rows = [
        changed(use={"tensor": 0.7}, config="slow"),
        changed(use={"tensor": 0.9}, config="fast"),
        changed(use={"tensor": 0.95}, config="without adapter", rank=0),
        changed(use={"tensor": 0.99}, config="small", tile=(64, 128, 64)),
        changed(use={"tensor": 0.99}, config="half", dtype="float16"),
        changed(use={"tensor": 0.99}, config="fast", note="bias"),
        changed(use={"tensor": 0.8}, config="double", double_quantized=True),
    ]
    chosen = best(rows, "fused_forward")
    assert chosen is not None
    assert chosen.config == "fast"
    double = best(rows, "fused_forward", double_quantized=True)
    assert double is not None
    assert double.config == "double"
    assert best(rows, "tail_forward") is None


def test_modelled_time_of_a_whole_kernel() -> None:
    assert output_cycles(ROW) == (5000 + 4096 / 64 * 1000) / 2 / (128 * 128)


def test_the_fastest_launch_of_a_rank() -> None:
    wide = changed(config="wide", tile=(128, 256, 64), use={"period": 1500.0})
    slow = changed(config="slow", use={"overhead": 90000.0})
    rows = [slow, wide, ROW, changed(use={"period": 1.0}, rank=0)]
    chosen = fastest(rows, "fused_forward", 16)
    assert chosen is not None
    assert chosen.config == "wide"  # more cycles, but for twice the output
    assert fastest(rows, "fused_forward", 64) is None
    assert fastest(rows, "fused_forward", 16, double_quantized=True) is None


def test_second_level_cache_traffic() -> None:
    card = Card("sm_90", sms=100, clock=1e9, bandwidth=1e12, l2_bandwidth=5e12)
    x_tile, packed, dense = 128 * 64 * 2, 128 * 64 * 0.5625, 128 * 64 * 2
    per_second = 2 / 1000 * 100 * 1e9
    assert l2_need(ROW, card) == pytest.approx((x_tile + packed) * per_second)
    assert l2_need(changed(format=""), card) == pytest.approx((x_tile + dense) * per_second)


def test_report() -> None:
    rows = [*full(), *full("sm_100")]
    rows = [
        changed(row, figures={"utilization": None}) if row.arch == "sm_100" and row.tile else row
        for row in rows
    ]
    spilling = dataclasses.replace(changed(taken={"spills": 3}), config="bad|name")
    results = evaluate([*rows, spilling], ["sm_90", "sm_100"], None)
    text = markdown([*rows, spilling], results)
    assert "1 not met" in text
    assert "3 spill instructions" in text
    assert "bad/name" in text  # a bar would end the cell
    assert "not modelled" in text
    widths = {line.count("|") for line in text.split("## sm_90")[1].splitlines() if "|" in line}
    assert len(widths) == 1
    record = json.loads(as_json([*rows, spilling], results))
    assert len(record["launches"]) == len(rows) + 1
    first = record["launches"][0]
    assert first["figures"]["resources"]["loads"] == {"128": 8}
    assert first["figures"]["utilization"]["tensor"] == 0.99
    assert "seconds" not in first["figures"]
    assert [gate["passed"] for gate in record["gates"]].count(False) == 1
