"""The projection of training steps: what holds of any such model, and against numbers known."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.project import RESULTS
from bench.projection.floor import floor, flops
from bench.projection.ours import INDUCTOR, WRITTEN, chosen, ours
from bench.projection.peer import common, outside
from bench.projection.report import CARDS, GAPS, PEERS, Row, as_json, markdown, project
from bench.projection.seconds import Seconds
from bench.projection.shapes import MODELS, ModelShape
from bench.projection.step import RANK, Step
from qlora_compile.kernels.device_model import DeviceModel
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import candidates

LLAMA_8B = MODELS[0]
BLOCK_BYTES = RESULTS / "block_bytes.json"


@pytest.fixture(scope="module", params=[True, False], ids=["checkpointed", "plain"])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return project(request.param)


def test_every_card_and_model_is_there(rows: list[Row]) -> None:
    assert [card.name for card in CARDS] == ["A100", "RTX 4090", "H100", "B200"]
    assert len(rows) == 2 * len(MODELS) * len(CARDS) == 24
    assert {len(row.sides) for row in rows} == {5}


def test_nobody_is_below_the_floor_in_any_part(rows: list[Row]) -> None:
    for row in rows:
        least = row.sides["floor"]
        assert 0 < row.at_peak < least.total
        for name, side in row.sides.items():
            excess = asdict(side - least)
            assert min(excess.values()) >= -1e-9 * least.total, (name, row.step, excess)


def test_the_gap_is_the_sum_of_its_parts(rows: list[Row]) -> None:
    for row in rows:
        parts = sum(getattr(row.gap, part) for part in GAPS)
        difference = row.sides["ours"].total - row.sides["floor"].total
        assert parts == pytest.approx(difference, rel=1e-9)
        assert difference > 0
    assert {field.name for field in fields(Seconds)} == {*GAPS, "optimizer"}


def test_taking_apart_loses_nothing(rows: list[Row]) -> None:
    """The choices' own modelled seconds, and what is around them, are all of ours."""
    for row in rows:
        step, device = row.step, row.device
        calls = sum(
            (step.forwards if each.direction == "forward" else 1) * each.seconds
            for each in row.chosen
        )
        around = INDUCTOR.seconds(step, device) + outside(step, device)
        block = calls + common(step, device).total
        assert row.sides["ours"].total == pytest.approx(step.model.layers * block + around.total)


@given(
    model=st.sampled_from(MODELS),
    device=st.sampled_from(CARDS),
    batch=st.integers(1, 8),
    length=st.integers(1, 4096),
    checkpointing=st.booleans(),
)
def test_the_floor_is_below_everybody(
    model: ModelShape, device: DeviceModel, batch: int, length: int, checkpointing: bool
) -> None:
    step = Step(model, batch, length, checkpointing)
    least = floor(step, device).total
    assert 0 < least < ours(step, device).total
    assert all(least < peer.seconds(step, device).total for peer in PEERS)


@pytest.mark.parametrize(
    ("model", "published"),
    list(zip(MODELS, (8_030_261_248, 70_553_706_496, 30_532_122_624), strict=True)),
    ids=lambda value: getattr(value, "name", ""),
)
def test_models_have_the_parameters_of_their_checkpoints(model: ModelShape, published: int) -> None:
    norms = (2 * model.layers + 1) * model.hidden
    norms += 2 * model.layers * model.head_dim * model.head_norm
    assert model.parameters + norms == published


@pytest.mark.parametrize("checkpointing", [True, False])
def test_flops_agree_with_the_usual_count(checkpointing: bool) -> None:
    """Two per weight and token forward and two for the gradient of the input; no weight gradient
    but the adapters'; attention as by PaLM (Chowdhery et al. 2022), halved where it is causal and
    without recomputed scores."""
    step = Step(LLAMA_8B, 4, 2048, checkpointing)
    again = int(checkpointing)
    tokens, blocks = step.rows, LLAMA_8B.linear_weights
    weights = 2 * tokens * ((2 + again) * blocks + 2 * LLAMA_8B.head_weights)
    adapters = 2 * tokens * (3 + again) * LLAMA_8B.adapter_parameters(RANK)
    per_token = 4 * LLAMA_8B.layers * LLAMA_8B.q_columns * step.length / 2
    expected = weights + adapters + tokens * (3 + again) * per_token
    assert flops(step) == pytest.approx(expected, rel=1e-9)
    # 8 B parameters, all but the embedding; a third of full training's six is not computed.
    plain = 4 * 7.5e9 * tokens
    assert checkpointing or flops(step) == pytest.approx(plain, rel=0.1)


def test_choices_are_the_best_candidates() -> None:
    """For o of Llama-3-8B, whose group has one Linear."""
    step = Step(LLAMA_8B, 4, 2048)
    for device in CARDS:
        problem = Problem(
            *("forward", 8192, FORMATS[0].usual_layout((4096, 4096)), RANK),
            *(torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
            *(False, False, True, "cuda"),
        )
        with assuming(device.target, kind="cuda"):
            best = candidates(problem, device)[0]
        (found,) = (c for c in chosen(step, device) if (c.group, c.direction) == ("o", "forward"))
        assert (found.name, found.seconds) == (best.name, best.seconds)


def test_inductor_writes_what_was_counted() -> None:
    """Of the block that bench/block_bytes.py compiles: 512 tokens, hidden 2048, 32 heads of 64, 8
    of k, MLP 5632."""
    counted = json.loads(BLOCK_BYTES.read_text())["float32, 0.0"]["ours"]["written"]
    columns = {"hidden": 2048, "heads": 2048 + 512, "inner": 5632}
    values = sum(sum(WRITTEN[name]) * columns[name] for name in columns)
    assert 2 * 512 * values == pytest.approx(counted, rel=0.05)


def test_results_are_those_of_this_code() -> None:
    """Else: make bench-project."""
    rows = project()
    assert (RESULTS / "projection.md").read_text() == markdown(rows)
    saved = json.loads((RESULTS / "projection.json").read_text())["steps"]
    for old, new in zip(saved, json.loads(as_json(rows))["steps"], strict=True):
        seconds = old.pop("modelled_seconds")
        for side, parts in new.pop("modelled_seconds").items():
            assert seconds.pop(side) == pytest.approx(parts)
        assert seconds == {}
        chosen = zip(old.pop("chosen"), new.pop("chosen"), strict=True)
        assert all(a == pytest.approx(b) for a, b in chosen)
        assert old == pytest.approx(new)
