"""Selectors: each knows its own records and decisions, and is found by name while it lives."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from qlora_compile.kernels import selection
from qlora_compile.kernels.device_model import CPU
from qlora_compile.kernels.selector import (
    MODELLED,
    Selector,
    is_known,
    select,
    selector_named,
)
from qlora_compile.kernels.variants import native_adapter
from tests.kernels.test_selection import TYPICAL

PROBLEM = replace(TYPICAL, device="cpu")


@pytest.fixture(autouse=True)
def products_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a CPU that multiplies 16-bit operands."""
    monkeypatch.setattr(native_adapter, "multiplies", lambda dtype: True)


def test_selectors_do_not_see_each_other() -> None:
    one, other = Selector("one"), Selector("other")
    modelled = select(PROBLEM)
    slower = selection.candidates(PROBLEM, CPU)[-1]
    one.remember(PROBLEM, slower)
    assert select(PROBLEM, "one") is slower
    assert select(PROBLEM) == select(PROBLEM, "other") == modelled
    assert other.take_misses() == [PROBLEM]
    assert other.take_misses() == one.take_misses() == []


def test_looking_up_records_no_miss() -> None:
    selector = Selector("one")
    assert selector.look_up(PROBLEM) == selector.select(PROBLEM)
    selector.take_misses()
    selector.look_up(PROBLEM)
    selector.prefers_saving(PROBLEM)
    assert selector.take_misses() == []


def test_living_selectors_have_names_of_their_own() -> None:
    """Two tuners of one kind, as for two folders, must not answer for each other."""
    three = [Selector("same") for _ in range(3)]
    assert len({each.name for each in three}) == 3
    assert three[0].name == "same"
    for each in three:
        assert selector_named(each.name) is each


def test_the_cost_model_answers_for_a_dead_or_unknown_name() -> None:
    selector = Selector("mortal")
    selector.remember(PROBLEM, selection.candidates(PROBLEM, CPU)[-1])
    recorded, modelled = select(PROBLEM, "mortal"), select(PROBLEM)
    assert recorded != modelled
    assert is_known("mortal")
    del selector
    gc.collect()
    assert not is_known("mortal")
    assert is_known(MODELLED)
    assert select(PROBLEM, "mortal") == select(PROBLEM, "never heard of") == modelled
    # The name is free again, and its new owner knows nothing of the old one's records.
    again = Selector("mortal")
    assert again.name == "mortal"
    assert select(PROBLEM, "mortal") == modelled


def test_the_generation_moves_when_a_choice_may_have_changed() -> None:
    selector = Selector("one")
    choice = selector.select(PROBLEM)
    seen = [selector.generation]

    def moved() -> bool:
        seen.append(selector.generation)
        return seen[-1] != seen[-2]

    selector.select(PROBLEM)
    selector.look_up(PROBLEM)
    selector.saves_low_rank(PROBLEM)
    selector.take_misses()
    assert not moved()
    selector.remember(PROBLEM, choice)
    assert moved()
    selector.exclude(PROBLEM, [choice.name])
    assert moved()
    selector.forget_records()
    assert moved()
    assert selector.select(PROBLEM) != choice
    selector.use_cpu(CPU)
    assert not moved()
    selector.use_cpu(replace(CPU, bandwidth=1e9))
    assert moved()
    assert len(set(seen)) == 5


def test_a_decision_to_save_stays_while_records_change() -> None:
    """A checkpoint's recomputation saves what its forward saved."""
    selector = Selector("one")
    first = selector.saves_low_rank(PROBLEM)
    for each in selection.problems_of_call(PROBLEM, trains=True):
        against = each.keeps_low_rank == first
        selector.remember(each, replace(select(each), seconds=9.0 if against else 1.0))
    assert selector.saves_low_rank(PROBLEM) is first
    assert selector.prefers_saving(PROBLEM) is first
    assert Selector("fresh").prefers_saving(PROBLEM) == first
    # The records do decide otherwise where nothing was decided before.
    undecided = Selector("undecided")
    undecided._records = selector._records
    assert undecided.saves_low_rank(PROBLEM) is not first
    assert not selector.saves_low_rank(replace(PROBLEM, rank=0))


def test_only_what_a_measurement_decides_is_measured() -> None:
    """Where a forward is faster without S, it is measured whether its backward may lose as much."""
    selector = Selector("one")
    saving = selector.problems_to_measure(PROBLEM, trains=True)
    assert [each.direction for each in saving] == ["forward", "backward"]
    assert all(each.keeps_low_rank for each in saving)
    assert selector.prefers_saving(PROBLEM)
    assert selector.problems_to_measure(PROBLEM, trains=False) == (PROBLEM,)
    plain = replace(PROBLEM, rank=0, lora_dtype=torch.bfloat16)
    assert len(selector.problems_to_measure(plain, trains=True)) == 2
    dtypes = dict.fromkeys(("x_dtype", "compute_dtype", "out_dtype"), torch.float32)
    # An adapter that is merged into the weight needs no S.
    merged = replace(PROBLEM, m=1 << 16, **dtypes)
    assert "merged" in select(merged).name
    assert len(selector.problems_to_measure(merged, trains=True)) == 4


def test_measured_seconds_are_not_compared_with_modelled_ones() -> None:
    """When the budget ended between the problems of one call."""
    selector = Selector("one")
    modelled = selector.prefers_saving(PROBLEM)
    for each in selection.problems_of_call(PROBLEM, trains=True):
        if each.keeps_low_rank == modelled and each.direction == "backward":
            selector.remember(each, replace(select(each), seconds=1e9))
    assert selector.prefers_saving(PROBLEM) == modelled


def test_figures_of_the_cpu_belong_to_one_selector() -> None:
    measured, other = Selector("measured"), Selector("other")
    modelled = select(PROBLEM)
    assert measured.select(PROBLEM) == modelled
    measured.use_cpu(replace(CPU, gemm=(*CPU.gemm[:2], 1e6, 1e6)))
    assert measured.select(PROBLEM) != modelled
    assert other.select(PROBLEM) == select(PROBLEM) == modelled
