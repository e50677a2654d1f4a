"""The scaling curves: their fits, their report, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.peers.contenders import OURS, STOCK, STOCK_COMPILED
from bench.peers.race import Run
from bench.peers.settings import Setting
from bench.scaling import __main__ as command
from bench.scaling.axes import AXES, BASE, FIRST_STEP, TOKENS, Axis
from bench.scaling.fit import fit, two_digits
from bench.scaling.points import law
from bench.scaling.quantities import FIRST, STEP
from bench.scaling.report import FLAT_FROM, FLAT_TO, flatness, section, told

APP = typer.Typer()
APP.command()(command.main)


def run(setting: Setting, name: str, exponent: float, loss: float = 8.0) -> Run:
    """Return a step of tokens**exponent / 1000 seconds; the first takes 10 more and a tenth per
    layer."""
    step = setting.tokens**exponent / 1000
    found = Run(name, build=1.0, first=step + 10 + setting.layers / 10)
    found.peak, found.saved = 2_000_000 * setting.tokens, 1_000_000 * setting.tokens
    found.seconds, found.losses = [step] * 5, [loss] * 5
    return found


def measure(setting: Setting, names: list[str], steps: int) -> list[Run]:
    assert steps == len(run(setting, OURS, 1).seconds) + 1
    return [run(setting, name, 1 if name == OURS else 0.5) for name in names]


def along(axis: Axis) -> dict[Setting, list[Run]]:
    return {setting: measure(setting, [OURS, STOCK], 6) for setting in axis.settings}


@given(
    st.floats(-3, 3),
    st.floats(1e-3, 1e3),
    st.lists(st.integers(1, 4096), min_size=3, max_size=8, unique=True).map(sorted),
)
def test_a_power_law_is_recovered(exponent: float, factor: float, xs: list[int]) -> None:
    found = fit(xs, [factor * x**exponent for x in xs])
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.factor == pytest.approx(factor, rel=1e-4)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.off == pytest.approx(1, abs=1e-6)
    assert found(xs[0]) == pytest.approx(factor * xs[0] ** exponent, rel=1e-6)


def test_errors_of_a_fit() -> None:
    """Logarithms 0, 1, 2 and, by hand, residuals 1/6, -1/3, 1/6 about a slope of 1/2."""
    e = 2.718281828459045
    found = fit([1, e, e * e], [1, 1, e])
    assert found.exponent == pytest.approx(0.5)
    assert found.error == pytest.approx((1 / 6 / 2) ** 0.5)
    assert found.off == pytest.approx(e ** (1 / 3))
    assert found.last == pytest.approx(1)
    with pytest.raises(ValueError, match="three points, not 2"):
        fit([1, 2], [1, 2])


def test_a_zero_has_no_sign() -> None:
    assert [two_digits(x) for x in (-0.001, 0.001, -0.126)] == ["0.00", "0.00", "-0.13"]


def test_points_are_shared() -> None:
    settings = [setting for axis in AXES.values() for setting in axis.settings]
    assert settings.count(BASE) == 4
    assert len(set(settings)) == len(settings) - 3
    for axis in AXES.values():
        sizes = [axis.x(setting) for setting in axis.settings]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= 4


def test_a_section_has_rows_and_exponents() -> None:
    text = "\n".join(section(TOKENS, along(TOKENS)))
    assert "## tokens\n\n2 sequences, 2 layers, hidden 1024, rank 16.\n" in text
    assert "| 512 | 0.5120 | 0.0226 | 1024.0 | 1024.0 | 512.0 | 512.0 | 1.00 | 1.00 |" in text
    assert (
        "- step time ~ tokens^1.00 ± 0.00, every point within a factor of 1.00, ^1.00 between the "
        "last two (stock ^0.50 ± 0.00).\n"
    ) in text


def test_a_point_without_agreement_has_no_part() -> None:
    points = along(TOKENS)
    points[BASE] = [run(BASE, OURS, 3, loss=9.0), run(BASE, STOCK, 3)]
    text = "\n".join(section(TOKENS, points))
    assert f"| 512 | {OURS}: its losses are 12.5% from those of {STOCK} |" in text
    assert "tokens^1.00 ± 0.00" in text
    points[BASE][1].failed = "killed"
    assert f"| 512 | {STOCK} failed: killed |" in "\n".join(section(TOKENS, points))


def test_too_few_points_are_not_fitted() -> None:
    points = dict(list(along(TOKENS).items())[:2])
    assert told(TOKENS, STEP, points) == "step time: too few points for an exponent"
    points = along(FIRST_STEP)
    for runs in points.values():
        runs[1].first = 0.0
    assert law(FIRST_STEP, FIRST, STOCK, points) is None
    assert "(stock not fitted: too few points)" in told(FIRST_STEP, FIRST, points)


def test_flatness() -> None:
    points = along(FIRST_STEP)
    (line,) = flatness(points)
    assert line.endswith("at 64 layers / at 8: 1.519, target 1.3: not met")
    for setting, runs in points.items():
        runs[0].first = STEP.of(runs[0]) + {FLAT_FROM: 10.0, FLAT_TO: 13.0}.get(setting.layers, 9)
    (line,) = flatness(points)
    assert line.endswith(": 1.300, target 1.3: met")
    assert flatness({s: runs for s, runs in points.items() if s.layers != FLAT_TO}) == []


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "race", measure)
    return tmp_path


def test_a_full_run_is_written(results: Path) -> None:
    done = CliRunner().invoke(APP, [])
    assert done.exit_code == 0, done.output
    text = (results / "scaling.md").read_text()
    assert all(f"## {name}\n" in text for name in AXES)
    content = json.loads((results / "scaling.json").read_text())
    assert len(content["points"]) == sum(len(axis.settings) for axis in AXES.values()) - 3
    assert len(content["laws"]) == 2 * sum(len(axis.quantities) for axis in AXES.values())
    assert (results / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_is_printed_and_not_written(results: Path) -> None:
    done = CliRunner().invoke(APP, ["first step", "--compiled"])
    assert done.exit_code == 0, done.output
    assert (
        "2 x 64 tokens, 8 layers, hidden 512, rank 16: qlora_compile: step 0.1280 s" in done.output
    )
    assert f"{STOCK_COMPILED}, 8 layers: {FIRST.name} 10.80 s" in done.output
    assert "## tokens" not in done.output
    assert list(results.iterdir()) == []
    done = CliRunner().invoke(APP, ["breadth"])
    assert done.exit_code == 2
