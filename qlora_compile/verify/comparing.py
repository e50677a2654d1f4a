"""Comparing: judges results by a reference and by the plain computation's own error."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_compile.verify.certificate import Comparison
from qlora_compile.verify.graph_results import Results

FACTOR = 4.0
"""A rewritten graph's error may be this many times that of the plain computation in the same
dtypes. Of hundreds of gradients some have, by luck, a plain error a third of the usual one."""

CALL_FACTOR = 2.0
"""The same for a single fused call, where few roundings add up."""

LOST_FACTOR = 10.0
"""The same if the plain computation has no correct digit, as for gradients that cancel out."""

_LOST = 0.5
"""From this plain error on, no digit is correct."""

NOISE = {
    torch.float64: 64 * torch.finfo(torch.float64).eps,
    torch.float32: 64 * torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps / 4,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 4,
}
"""The least plain error to judge by: one rounding or another order of a sum causes as much. The
float64 reference itself is no more exact."""

_OWN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The allowed error if the captured graph, the reference, runs in its own dtypes only."""


@dataclass(kw_only=True)
class Comparing:
    """Comparisons on one kind of inputs. inputs: the kind, as in Comparison. lowest: the lowest
    precision computed in. mismatch: the first failure, in words, or None."""

    inputs: str
    lowest: torch.dtype
    comparisons: list[Comparison] = field(default_factory=list)
    mismatch: str | None = None

    def compare_all(
        self, plain: Results, exact: Results | None, actual: Results, factor: float
    ) -> None:
        """Compare `actual` with `exact`; `factor` times the error of `plain` is allowed.

        exact: None where nothing better than `plain` can be computed.
        """
        for name in dict.fromkeys([*plain, *actual]):
            self.mismatch = self.mismatch or self._compare(name, plain, exact, actual, factor)

    def _compare(
        self,
        name: str,
        plains: Results,
        exacts: Results | None,
        actuals: Results,
        factor: float,
    ) -> str | None:
        """Record one comparison; return what is wrong, None if it passes."""
        plain, actual = plains.get(name), actuals.get(name)
        exact = plain if exacts is None else exacts.get(name)
        subject = f"{name} (inputs: {self.inputs})"
        if plain is None and actual is None:
            return None
        if plain is None or exact is None or actual is None:
            side = "the rewritten" if actual is None else "the original"
            return f"{subject} is missing from {side} graph"
        if (actual.shape, actual.dtype) != (plain.shape, plain.dtype):
            was = f"{dtype_name(plain.dtype)} {list(plain.shape)}"
            return f"{subject} is {dtype_name(actual.dtype)} {list(actual.shape)}, not {was}"
        if not plain.is_floating_point():
            return None if torch.equal(plain, actual) else f"{subject} differs"
        # Elements that overflow or divide by zero in the plain computation are not compared.
        defined = plain.isfinite() & exact.isfinite()
        if plain.numel() and not defined.any():
            return f"{subject} cannot be compared: the original computes no finite value of it"
        invalid = int((~actual.isfinite() & defined).sum())
        if invalid:
            return f"{subject} holds {invalid} NaN or infinite values that the original does not"
        exact = torch.where(defined, exact, 0.0).double()
        error = _error(torch.where(defined, actual, 0.0), exact)
        plain_error = _error(torch.where(defined, plain, 0.0), exact)
        factor = factor if plain_error < _LOST else LOST_FACTOR
        allowed = factor * max(plain_error, NOISE[self.lowest])
        if exacts is None:
            allowed = _OWN[self.lowest]
        result = Comparison(self.inputs, name, error, plain_error, allowed)
        self.comparisons.append(result)
        if result.passes:
            return None
        return (
            f"{subject} is off by {error:.1e} of its norm, allowed {allowed:.1e} "
            f"(the original's own error is {plain_error:.1e})"
        )


def _error(value: Tensor, exact: Tensor) -> float:
    """Return ‖value - exact‖ / ‖exact‖ by Euclidean norms, or ‖value‖ if `exact` is zero."""
    return float((value.double() - exact).norm()) / (float(exact.norm()) or 1.0)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
