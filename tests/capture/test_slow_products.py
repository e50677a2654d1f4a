"""Linears outside of the blocks are fused in those calls for which torch has only plain loops."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_compile
from bench.agreement import distance, training_step
from qlora_compile import sites
from qlora_compile.capture.first_step import UnfusedWarning
from qlora_compile.capture.regions import RegionSites, region_of
from qlora_compile.errors import AlreadyOptimizedError
from qlora_compile.kernels.cpu import instructions, slow_products
from qlora_compile.kernels.cpu.slow_products import FEW_ROWS, is_slow, may_be_slow
from qlora_compile.report import Site
from tests.test_equality import BF16_FACTOR, as_rewritten, lora, without_inductor
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten", "without_inductor"]

HEAD = "base_model.model.lm_head"
KEPT = "it is the output head, kept in full precision"


@pytest.fixture(autouse=True)
def without_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies float32 alone."""
    monkeypatch.setattr(instructions, "level", lambda: "avx2")
    monkeypatch.setattr(sites, "may_be_slow", may_be_slow)


@pytest.fixture
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def optimized(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(1)
    return qlora_compile.optimize(toy(dtype=dtype), lora(), quantize="nf4", **options).train()


def head(model: Any) -> Site:
    return next(site for site in qlora_compile.explain(model).sites if site.name == HEAD)


def planned(model: Any) -> RegionSites | None:
    region = region_of(model.get_submodule(HEAD))
    return region and region.planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("without_inductor")
def test_a_step_agrees_with_torchs_loops(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 24)
    ours = training_step(model := optimized(dtype), ids)
    assert head(model).fused
    exact = training_step(optimized(torch.float32), ids)
    monkeypatch.setattr(slow_products, "multiplies", lambda dtype: True)
    stock = training_step(model := optimized(dtype), ids)
    assert head(model).reason == KEPT
    errors = distance(stock, exact)
    for group, error in distance(ours, exact).items():
        assert error <= BF16_FACTOR * errors[group], group


@pytest.mark.usefixtures("as_rewritten")
def test_a_head_in_float32_is_fused_under_autocast_alone() -> None:
    model = optimized(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfusedWarning)
        for _ in range(2):
            training_step(model, tokens())
            assert head(model).reason == KEPT
        with torch.autocast("cpu", torch.bfloat16):
            training_step(model, tokens())
        assert head(model).fused
        training_step(model, tokens())
        assert head(model).reason == KEPT


@pytest.mark.usefixtures("as_rewritten")
def test_few_rows_without_a_gradient_are_left_to_torch() -> None:
    model = optimized()
    with torch.no_grad():
        model(input_ids=tokens(1, FEW_ROWS))
        assert head(model).fused
        model(input_ids=tokens(1, FEW_ROWS - 1))
        assert head(model).reason == KEPT
        model.eval().generate(tokens(1, FEW_ROWS - 1), max_new_tokens=2, do_sample=False)
        assert head(model).reason == KEPT
    training_step(model.train(), tokens(1, 3))
    assert head(model).fused


@pytest.mark.usefixtures("as_rewritten")
def test_every_linear_outside_of_the_blocks_is_meant() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(64, 64), nn.Linear(64, 8)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(2)])
            self.requires_grad_(requires_grad=False).bfloat16()
            self.out.requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    model = qlora_compile.optimize(Model())
    model(torch.randn(FEW_ROWS, 64, dtype=torch.bfloat16))
    sites = {site.name: site.fused for site in qlora_compile.explain(model).sites}
    # What is trained in full stays torch's.
    assert sites == {"into": True, "blocks.0.0": True, "blocks.1.0": True, "out": False}
    assert region_of(model.out) is None


@pytest.mark.usefixtures("as_rewritten")
def test_the_region_of_a_head_is_like_any_other() -> None:
    model = optimized(strict=True)
    training_step(model, tokens())
    with pytest.raises(AlreadyOptimizedError):
        qlora_compile.optimize(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert planned(copied) == planned(model)
        training_step(copied, tokens())
        assert head(copied).fused
    assert not any("region" in name for name in model.state_dict())


@pytest.mark.usefixtures("as_rewritten")
def test_a_loss_without_logits_leaves_the_head_alone() -> None:
    model, ids = optimized(logits_free_loss=True), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert head(model).reason == KEPT


def test_where_16_bits_are_multiplied_there_is_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_products, "multiplies", lambda dtype: True)
    assert planned(optimized()) is None


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, True)],
    ids=str,
)
def test_which_weights_may_be_slow(dtype: torch.dtype, *, expected: bool) -> None:
    weight = torch.zeros(4, 4, dtype=dtype)
    assert may_be_slow(weight) == expected
    assert not may_be_slow(weight.clone().requires_grad_())
    assert not may_be_slow(weight.to("meta"))


@pytest.mark.usefixtures("autocast")
def test_autocast_casts_all_but_float64() -> None:
    rows = torch.zeros(FEW_ROWS, 4)
    assert is_slow(rows)
    assert is_slow(rows.bfloat16())
    assert not is_slow(rows.double())
    assert not is_slow(rows[:0].requires_grad_())
