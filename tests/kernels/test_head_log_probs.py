"""Log-probabilities of labels against torch's log_softmax over all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.kernels.cpu import instructions
from qlora_compile.kernels.head_log_probs import LogProbs, computes, head_log_probs
from tests.examples import examples

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FACTOR = 1.5
"""Ours may err this many times as much as the plain computation in the same dtypes, plus what one
rounding of each logit and of each result does."""


@dataclass(frozen=True)
class Case:
    """dtypes: of hidden, of the weight, and of autocast. losses: which results have a gradient.
    outside: how far labels go beyond the vocabulary."""

    rows: int = 7
    vocabulary: int = 19
    width: int = 12
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None] = (BF16, BF16, None)
    logit_scale: float = 1.0
    losses: tuple[str, ...] = ("log_probs",)
    seed: int = 0
    outside: int = 0

    def results(self, ours: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return all results and hidden's gradient, by our kernel or by plain operators, these in
        the case's dtypes or in `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        first, second, autocast = self.dtypes
        hidden = normal(self.rows, self.width).to(first).to(dtype or first).requires_grad_()
        weight = normal(self.vocabulary, self.width).mul(0.5).to(second).to(dtype or second)
        ends = -self.outside, self.vocabulary + self.outside
        labels = torch.randint(*ends, (self.rows,), generator=generator)
        with torch.autocast("cpu", autocast, enabled=autocast is not None and dtype is None):
            if ours:
                assert computes(hidden, weight)
                found = head_log_probs(hidden, weight, labels, self.logit_scale)
            else:
                found = _plain(torch.nn.functional.linear(hidden, weight), labels, self.logit_scale)
        weights = {name: normal(self.rows) for name in self.losses}
        loss: Any = sum((getattr(found, n) * w.to(dtype or F32)).sum() for n, w in weights.items())
        (gradient,) = torch.autograd.grad(loss, hidden)
        logits = self.logit_scale * hidden.detach().double() @ weight.double().t()
        column, inside = _place(logits, labels)
        others = logits.scatter(1, column, -torch.inf).amax(1)
        own = logits.gather(1, column).squeeze(1)
        lead = torch.where(inside, own - others, -logits.amax(1))
        measures = {"largest": logits.abs().max(), "weight": weight.abs().max(), "lead": lead}
        return {**found._asdict(), "gradient": gradient} | ({} if ours else measures)


def _place(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a column for each label, [M, 1], and whether it is the label's."""
    column = labels.clamp(0, logits.shape[1] - 1)
    return column.unsqueeze(1), column == labels


def _plain(logits: Tensor, labels: Tensor, logit_scale: float) -> LogProbs:
    """Compute all results; a label outside the vocabulary has the logit 0, as in TRL."""
    z = torch.promote_types(logits.dtype, F32)
    z = logits.to(z) * logit_scale
    logarithms = z.log_softmax(1)
    p = logarithms.exp()
    column, inside = _place(z, labels)
    own = z.gather(1, column).squeeze(1).masked_fill(~inside, 0.0)
    before = torch.arange(z.shape[1]) < labels.unsqueeze(1)
    log_probs = logarithms.gather(1, column).squeeze(1)
    return LogProbs(
        log_probs=torch.where(inside, log_probs, -z.logsumexp(1)),
        entropy=-(p * logarithms).sum(1),
        log_sum_squares=p.square().sum(1).log(),
        mean_logit=z.mean(1),
        is_first=(own >= z.amax(1)) & (own > z.masked_fill(~before, -torch.inf).amax(1)),
    )


def check(case: Case) -> None:
    ours, plain, exact = case.results(True), case.results(False), case.results(False, F64)
    eps = torch.finfo(case.dtypes[2] or case.dtypes[0]).eps
    largest, weight = float(exact.pop("largest")), float(exact.pop("weight"))
    assert ours["is_first"].dtype == torch.bool
    # Where the label leads by less than the roundings, both may be right.
    leads = ours.pop("is_first") != plain["is_first"]
    assert not (leads & (exact["lead"].abs() > 4 * eps * largest)).any()
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        error = (value.double() - exact[name]).norm()
        allowed = FACTOR * (plain[name].double() - exact[name]).norm()
        # A rounding of a logit, relative to it, is an absolute one of its probability's logarithm,
        # which the entropy's gradient multiplies by that logarithm.
        rounding = eps * (1 + largest) * case.rows**0.5
        if name == "gradient":
            rounding *= weight * case.logit_scale * (1 + largest * ("entropy" in case.losses))
        assert error <= allowed + rounding, (name, error, allowed, rounding)


CASES = st.builds(
    Case,
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 300),
    width=st.integers(1, 40),
    dtypes=st.sampled_from(
        [(F32, F32, None), (BF16, BF16, None), (F32, BF16, BF16), (BF16, BF16, BF16)]
    ),
    logit_scale=st.sampled_from([1.0, 0.25, 3.0]),
    losses=st.sampled_from([("log_probs",), ("entropy",), ("log_probs", "entropy")]),
    seed=st.integers(0, 1 << 16),
    outside=st.sampled_from([0, 0, 3]),
)


@settings(max_examples=examples(60))
@given(CASES)
@example(Case(rows=300, losses=("entropy",)))
@example(Case(vocabulary=3, outside=3, losses=("log_probs", "entropy")))
def test_equals_log_softmax_over_all_logits(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("level", instructions.levels())
def test_at_every_level_of_instructions(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "level", lambda: level)
    check(Case(losses=("log_probs", "entropy")))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_of_equal_logits_only_the_first_is_the_first(dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(4, 8, dtype=dtype), torch.ones(6, 8, dtype=dtype)
    weight[0] = -1
    found = head_log_probs(hidden, weight, torch.tensor([0, 1, 2, 5]))
    assert found.is_first.tolist() == [False, True, False, False]


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight = torch.ones(2, 8, requires_grad=True), torch.ones(6, 8)
    with torch.no_grad():
        found = head_log_probs(hidden, weight, torch.tensor([0, 1]))
    assert not found.log_probs.requires_grad
    found = head_log_probs(hidden, weight, torch.tensor([0, 1]))
    assert [each.requires_grad for each in found] == [True, True, False, False, False]


def test_what_is_not_computed() -> None:
    hidden, weight = torch.ones(2, 8), torch.ones(6, 8)
    assert computes(hidden, weight)
    assert not computes(hidden.double(), weight.double())
    assert not computes(hidden.half(), weight.half()) or not instructions.multiplies(torch.float16)
    assert not computes(hidden, weight.requires_grad_())
