"""HeadVerifier: checks the loss that is computed without logits, with all its gradients."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from qlora_compile.hf.head_operands import HeadLoss
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.verify.check import Checked, lowest_precision
from qlora_compile.verify.comparing import FACTOR, Comparing
from qlora_compile.verify.graph_results import outputs_and_gradients
from qlora_compile.verify.verifier import Verifier

_KERNELS = ("chunked cross-entropy",)

_LOGITS = 2**25
"""The most logits that a check makes, of 8 bytes each: more rows would show nothing more."""


class HeadVerifier(Verifier):
    """Checks the first loss of every kind, as a `check` of LogitsFreeLoss."""

    def __call__(self, loss: HeadLoss) -> str | None:
        if self.mismatches:
            return self.mismatches[0]
        pattern = _pattern(loss)
        counts = bool((loss.labels != loss.ignore_index).any())
        if pattern in self.certificates or not counts:
            return None
        rows = max(_LOGITS // loss.operands.weight.shape[0], 1)
        return self.judge(
            pattern, _KERNELS, str(loss.hidden.device), lambda: check_head(loss.of_rows(rows))
        )


def check_head(loss: HeadLoss) -> Checked:
    """Compare a loss without logits, and its gradients, with a float64 evaluation by way of logits.

    An error may be FACTOR times that of the evaluation by way of logits in the tensors' own dtypes.
    """
    names, args = list(loss.tensors), list(loss.tensors.values())
    lowest = lowest_precision(args)
    hidden = loss.hidden.detach().float()
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    random = hidden.mean() + noise.to(hidden.device) * hidden.std(correction=0)
    random = random.to(loss.hidden.dtype).requires_grad_(loss.hidden.requires_grad)
    comparisons, mismatch = [], None
    for inputs, given in (("real", args), ("random", [random, *args[1:]])):

        def results(by: Any, wide: torch.dtype | None, given: Any = given) -> Any:
            computed = lambda *tensors: by(loss.given(tensors))  # noqa: E731
            return outputs_and_gradients(computed, names, given, wide)

        comparing = Comparing(inputs=inputs, lowest=lowest)
        exact = results(HeadLoss.with_logits, torch.float64)
        plain, actual = results(HeadLoss.with_logits, None), results(HeadLoss.without_logits, None)
        comparing.compare_all(plain, exact, actual, FACTOR)
        comparisons += comparing.comparisons
        mismatch = mismatch or comparing.mismatch
    return Checked(tuple(comparisons), "float64", lowest, mismatch)


def _pattern(loss: HeadLoss) -> str:
    """Return 16 hex digits of SHA-256 over what kind of loss this is, whatever its rows."""
    weight = loss.operands.weight
    device = loss.hidden.device.type
    described = [
        weight.layout if isinstance(weight, PackedWeight) else None,
        *((n, t.dtype, t.shape[1:], t.requires_grad) for n, t in loss.tensors.items()),
        (loss.softcap, loss.logit_scale, loss.ignore_index, loss.reduction, device),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]
