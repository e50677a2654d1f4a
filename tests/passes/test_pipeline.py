"""The pipeline's own guarantees: no pass loses a Linear, and an impossible call is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import qlora_compile
from qlora_compile import errors
from qlora_compile.capture import pipeline
from qlora_compile.kernels import registry
from qlora_compile.passes.calls import is_fused
from qlora_compile.passes.context import PassContext
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

pytestmark = pytest.mark.usefixtures("without_inductor")


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def optimized() -> Any:
    return qlora_compile.optimize(Chain().requires_grad_(False), scope="model")


def test_a_pass_that_loses_a_linear_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def loses_second(graph_module: GraphModule, context: PassContext) -> int:
        *_, last = (node for node in graph_module.graph.nodes if is_fused(node))
        (result,) = last.users
        result.replace_all_uses_with(last.args[0])
        graph_module.graph.erase_node(result)
        graph_module.graph.erase_node(last)
        return 1

    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES, loses_second))
    with pytest.raises(Exception, match="pass loses_second lost the linears") as raised:
        optimized()(torch.randn(2, 8))
    # Dynamo wraps what its backend raises.
    inner: Any = raised.value
    assert isinstance(inner.inner_exception, errors.PassError)
    assert inner.inner_exception.fields["lost"] == ["second"]


def test_what_no_variant_computes_is_an_error_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variant in registry.VARIANTS:
        reasons = [f"{variant.name} is out of order"]
        monkeypatch.setattr(variant, "rejects", lambda problem, reasons=reasons: reasons)
    with pytest.raises(Exception, match="is out of order") as raised:
        optimized()(torch.randn(2, 8))
    error = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(error, errors.NoVariantError)
    assert all(f"{variant.name} is out of order" in str(error) for variant in registry.VARIANTS)


def test_each_pass_logs_its_rewrites(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=pipeline.__name__):
        optimized()(torch.randn(2, 8))
    assert "match_linears: 2 rewrites" in caplog.messages
    assert len(caplog.messages) == len(pipeline.PASSES)
