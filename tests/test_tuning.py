"""`optimize(tune=...)`: what is measured when, found again, and reported."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import qlora_compile
from qlora_compile.capture.regions import Region, region_of
from qlora_compile.cli.app import app
from qlora_compile.kernels import call_times, selection, selector
from qlora_compile.kernels.cpu import tapes
from qlora_compile.kernels.variants import native_adapter
from qlora_compile.tuning import cpu_figures, modes
from qlora_compile.tuning import tuner as tuners
from qlora_compile.tuning.errors import TuneModeError
from qlora_compile.tuning.modes import tuner_of
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.tuner import Tuner
from qlora_compile.tuning.warning import RecordWarning
from tests.test_equality import as_rewritten, lora, step
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a moment for each problem."""
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(modes, "AUTO_BUDGET", 60.0)
    monkeypatch.setattr(tuners, "measured_cpu", lambda folder, caution: None)
    original = Tuner.__init__

    def brief(self: Tuner, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "each": 0.005})

    monkeypatch.setattr(Tuner, "__init__", brief)
    modes.forget_tuners()
    return tmp_path / "cache"


def optimized(layers: int = 2, dropout: float = 0.0, **options: Any) -> Any:
    model = toy(num_hidden_layers=layers)
    return qlora_compile.optimize(model, lora(dropout), quantize="nf4", **options).train()


def measurements(mode: str = "auto") -> int:
    tuner = tuner_of(mode)
    assert tuner is not None
    return tuner.measurements


def regions(model: Any) -> list[Region]:
    found = (region_of(module) for module in model.modules())
    return [region for region in found if region is not None]


def new_process() -> None:
    """Forgets what a new process would not know."""
    modes.forget_tuners()
    torch._dynamo.reset()


@pytest.mark.usefixtures("as_rewritten")
def test_the_second_run_measures_nothing(cache: Path) -> None:
    step(optimized(), tokens())
    measured = measurements()
    assert measured > 0
    assert len(RecordStore(cache).read()) == measured
    new_process()
    step(optimized(), tokens())
    assert measurements() == 0


@pytest.mark.usefixtures("as_rewritten")
def test_depth_costs_no_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for layers in (2, 12):
        monkeypatch.setenv("QLORA_COMPILE_CACHE", str(cache / str(layers)))
        new_process()
        step(optimized(layers), tokens())
        counts.append(measurements())
    assert counts[0] == counts[1]
    # Four shapes, two directions, S kept or not.
    assert counts[0] == 4 * 2 * 2


@pytest.mark.usefixtures("as_rewritten")
def test_more_rows_are_measured_on_their_next_call(cache: Path) -> None:
    model = optimized()
    step(model, tokens(2, 16))
    before = measurements()
    step(model, tokens(2, 15))  # the same power of two
    step(model, tokens(2, 15))
    assert measurements() == before
    step(model, tokens(2, 40))
    step(model, tokens(2, 40))
    assert measurements() > before


@pytest.mark.usefixtures("as_rewritten")
def test_nothing_is_measured_inside_a_backward(cache: Path) -> None:
    """A recomputed block would wait for it, and compute otherwise than it did at first."""
    tuner = tuner_of("auto")
    assert tuner is not None
    problem = next(iter(selection.problems_of_call(_some_problem(), trains=True)))
    asked = []

    def block(x: torch.Tensor) -> torch.Tensor:
        selector.select(problem, tuner.selector.name)
        tuner.ensure_missed()
        asked.append(tuner.measurements)
        tuner.selector.forget_records()
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert asked == [1, 1]


def _some_problem() -> Any:
    from tests.tuning.records import real_problem

    return real_problem()


@pytest.mark.usefixtures("as_rewritten")
def test_records_that_calls_refute_are_measured_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that were made beside other work, whose seconds are many times too long."""
    monkeypatch.setattr(tuners, "checked_cpu", lambda *_: cpu_figures.CheckedFigures(None, {}))
    step(optimized(), tokens())
    store = RecordStore(cache)
    spoilt = {}
    for record in store.read().values():
        timings = [replace(each, seconds=1e3 * each.seconds) for each in record.timings]
        store.append(replace(record, timings=tuple(timings)))
        spoilt[record.key] = record.winner.seconds
    new_process()
    model = optimized()
    monkeypatch.setattr(call_times, "_DISTANCES", range(1, 4))
    # The distance to the next timed call is drawn beforehand.
    monkeypatch.setattr(tapes._state, "countdown", call_times.Countdown())

    def steps() -> None:
        # Enough for each problem's five timed calls, and for measuring it anew.
        for _ in range(20):
            step(model, tokens())

    with pytest.warns(RecordWarning, match=r"is dropped: calls take 0\.0\d* times as long as it"):
        steps()
    assert measurements() > 0
    after = {key: record.winner.seconds for key, record in store.read().items()}
    assert measurements() == sum(after.get(key, 0) < 100 * spoilt[key] for key in spoilt)


@pytest.mark.usefixtures("as_rewritten")
def test_off_finds_but_does_not_measure(cache: Path) -> None:
    model = optimized(tune="off")
    step(model, tokens())
    assert measurements("off") == 0
    assert not cache.exists()
    site = qlora_compile.explain(model).sites[0]
    assert site.forward is not None
    assert not site.forward.measured
    new_process()
    step(optimized(), tokens())
    new_process()
    model = optimized(tune="off")
    step(model, tokens())
    assert measurements("off") == 0
    site = qlora_compile.explain(model).sites[0]
    assert site.forward is not None
    assert site.forward.measured


@pytest.mark.usefixtures("as_rewritten")
def test_model_knows_no_records(cache: Path) -> None:
    step(optimized(), tokens())
    new_process()
    model = optimized(tune="model")
    step(model, tokens())
    assert tuner_of("model") is None
    for site in qlora_compile.explain(model).sites:
        for chosen in (site.forward, site.backward):
            assert chosen is None or (not chosen.measured and chosen.gain is None)


@pytest.mark.usefixtures("as_rewritten")
@pytest.mark.parametrize("form", ["file", "folder"])
def test_shipped_records_are_used(cache: Path, tmp_path: Path, form: str) -> None:
    step(optimized(), tokens())
    shipped = tmp_path / ("shipped.jsonl" if form == "file" else "shipped/some.jsonl")
    shipped.parent.mkdir(exist_ok=True)
    RecordStore(cache).export(shipped, None)
    new_process()
    model = optimized(tune=shipped if form == "file" else shipped.parent)
    step(model, tokens())
    site = qlora_compile.explain(model).sites[0]
    assert site.forward is not None
    assert site.forward.measured
    # No path: compile caches would hold for one machine alone.
    for region in regions(model):
        assert region.records_name.rstrip("-0123456789") == modes.SHIPPED


@pytest.mark.usefixtures("as_rewritten")
def test_records_that_changed_are_read_again(cache: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    model = optimized(tune=shipped)
    step(model, tokens())
    step(optimized(), tokens())
    RecordStore(cache).export(shipped / "some.jsonl", None)
    for site in qlora_compile.explain(model).sites:
        assert site.forward is None or not site.forward.measured
    later = optimized(tune=shipped)
    step(later, tokens())
    # Both models ask the one tuner of that folder.
    for each in (model, later):
        step(each, tokens())
        site = qlora_compile.explain(each).sites[0]
        assert site.forward is not None
        assert site.forward.measured


@pytest.mark.usefixtures("as_rewritten")
def test_the_report_names_records_that_this_process_does_not_have(cache: Path) -> None:
    model = optimized()
    step(model, tokens())
    assert not qlora_compile.explain(model).unknown_records
    for region in regions(model):
        for graph, _ in region.graphs or ():
            graph.records_name = "of another process"
    report = qlora_compile.explain(model)
    assert report.unknown_records == ("of another process",)
    assert "this process has no records 'of another process'" in str(report)
    assert report.to_dict()["unknown_records"] == ["of another process"]
    for site in report.sites:
        for chosen in (site.forward, site.backward):
            assert chosen is None or not chosen.measured


@pytest.mark.usefixtures("as_rewritten")
def test_a_copy_survives_its_records(cache: Path, tmp_path: Path) -> None:
    step(optimized(), tokens())
    shipped = tmp_path / "shipped.jsonl"
    RecordStore(cache).export(shipped, None)
    pickled = pickle.dumps(optimized(tune=shipped))
    shipped.unlink()
    new_process()
    model = pickle.loads(pickled)
    with pytest.warns(RecordWarning, match="is gone"):
        step(model, tokens())
    chosen = qlora_compile.explain(model).sites[0].forward
    assert chosen is not None
    assert not chosen.measured


@pytest.mark.usefixtures("as_rewritten")
def test_a_first_step_may_come_under_autocast(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuners, "measured_cpu", cpu_figures.measured_cpu)
    step(optimized(), tokens(), autocast=True)
    assert measurements() > 0


@pytest.mark.usefixtures("as_rewritten")
def test_models_with_different_modes_live_side_by_side(cache: Path) -> None:
    tuned, modelled = optimized(), optimized(tune="model")
    for model in (tuned, modelled, tuned):
        step(model, tokens())
    reports = [qlora_compile.explain(model).sites[0].forward for model in (tuned, modelled)]
    assert [chosen is not None and chosen.measured for chosen in reports] == [True, False]


@pytest.mark.usefixtures("as_rewritten")
def test_the_report_tells_what_was_measured(cache: Path) -> None:
    model = optimized()
    step(model, tokens())
    report = qlora_compile.explain(model)
    records = {r.problem: r for r in RecordStore(cache).read().values()}
    fused = [site for site in report.sites if site.fused]
    assert len(fused) == 14
    for site in fused:
        assert site.forward is not None
        assert site.backward is not None
        for chosen, direction in ((site.forward, "forward"), (site.backward, "backward")):
            assert chosen.measured
            [record] = [
                r
                for p, r in records.items()
                if (p.direction, p.columns, p.k) == (direction, chosen.n, site.k)
                and (p.m, p.keeps_low_rank) == (chosen.rows, site.keeps_low_rank)
            ]
            assert (chosen.variant, chosen.config) == (record.winner.variant, record.winner.config)
            assert chosen.gain == record.gain
            assert chosen.seconds == record.winner.seconds
    text = str(report)
    assert "chosen by" in text
    assert text.count("measurement") == 8  # four shapes, two directions
    assert json.loads(report.to_json())["sites"][0]["forward"]["measured"] is True


@pytest.mark.usefixtures("as_rewritten")
def test_copies_and_pickles_go_on_with_the_same_records(cache: Path) -> None:
    model = optimized()
    step(model, tokens())
    measured = measurements()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step(twin, tokens())
        assert measurements() == measured
        chosen = qlora_compile.explain(twin).sites[0].forward
        assert chosen is not None
        assert chosen.measured


@pytest.mark.parametrize("bad", ["autom", "no/such/file.jsonl", "", 3, None])
def test_a_bad_mode_is_an_error_before_anything_changed(bad: Any) -> None:
    model = toy()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TuneModeError, match=r"tune=.*'auto', 'off', 'model', or the path"):
        qlora_compile.optimize(model, lora(), quantize="nf4", tune=bad)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_compiled_code_is_not_shared_between_sources(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Inductor keeps on disk holds the source and whether S is kept."""
    for decision in (True, False):
        monkeypatch.setattr(selector, "saving_is_faster", lambda *_, saved=decision: saved)
        new_process()
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        ids = tokens(3, 16)
        model = optimized(tune="model")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(model, ids)
        kept = [t for t in saved if tuple(t.shape) == (ids.numel(), 4)]
        assert bool(kept) is decision


class TestCommand:
    def run(self, *words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["tune", *words])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    def test_shapes_are_measured_and_known_then(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Elsewhere a product without an adapter has one candidate, and nothing to measure.
        monkeypatch.setattr(native_adapter, "multiplies", lambda dtype: True)
        words = ("--shapes", "8x24x64x2,8x24x64x0", "--budget", "10s")
        first = self.run(*words)
        assert "6 problems measured, 0 known before" in first
        assert "backward 8x24x64 rank 2, nf4/64 double, bfloat16, adapter float32, S kept" in first
        modes.forget_tuners()
        assert "0 problems measured, 6 known before" in self.run(*words)
        assert "6 problems measured, 0 known" in self.run(*words, "--again")
        assert len(RecordStore(cache).read()) == 6

    def test_what_the_budget_does_not_reach_is_said(self, cache: Path) -> None:
        text = self.run("--shapes", "8x24x64x2", "--budget", "0.000001s")
        assert "1 problems measured, 0 known before, 3 not measured: give more --budget" in text
        assert text.count("not measured  ") == 3

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "neither given; pass either --model or --shapes"),
            (("--shapes", "1x2x3"), "'1x2x3' is not four whole numbers"),
            (("--shapes", "1x2x3x4", "--budget", "soon"), "--budget 'soon' is not a time"),
            (("--shapes", "1x2x3x4", "--dtype", "bf16"), "--dtype 'bf16' is unknown"),
            (("--shapes", "1x2x3x4", "--format", "nf3"), "nf3"),
        ],
    )
    def test_bad_input_is_one_line(self, words: tuple[str, ...], message: str) -> None:
        text = self.run(*words, code=2)
        assert message in text
        assert len(text.splitlines()) == 1


def test_problems_read_well() -> None:
    problem = replace(_some_problem(), x_dtype=torch.bfloat16, bias=True, dropout=True)
    expected = (
        "forward 8x24x64 rank 2, nf4/64, bfloat16>float32>float32, adapter float32, bias, "
        "dropout, cpu"
    )
    assert str(problem) == expected
