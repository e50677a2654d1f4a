"""Correctness: what a right computation may be off by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_compile.tuning.correctness import Correctness
from qlora_compile.tuning.operands import operands
from tests.tuning.records import real_problem


@pytest.mark.parametrize("rows", [1, 64, 2048, 16384])
def test_a_sum_in_one_chain_is_right(rows: int) -> None:
    """As some libraries add up thin gradients: row after row, in float32."""
    problem = real_problem(m=rows, direction="backward", rank=2)
    call = operands(problem)
    [(tensors, _)] = call.group
    assert tensors.lora_b is not None
    assert tensors.scaling is not None
    low_rank = (call.grads[0] @ tensors.lora_b * tensors.scaling).numpy()
    terms = low_rank[:, :, None] * tensors.x.numpy()[:, None, :]
    chain = torch.from_numpy(np.add.accumulate(terms, axis=0, dtype=np.float32)[-1])
    exact = call.expected(exact=True)["grad lora_a"]
    error = float((chain - exact).norm() / exact.norm())
    allowed = Correctness(call).allowed["grad lora_a"]
    assert error <= allowed < 1e-5
