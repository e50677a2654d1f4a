"""The graphs as the passes leave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.fx import GraphModule

from qlora_compile.capture import backend


@pytest.fixture
def rewritten_graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Collect the rewritten form of every graph that is captured from now on."""
    graphs: list[GraphModule] = []
    inner = backend.compile_inner

    def keeping(graph_module: GraphModule, *rest: Any) -> Callable[..., Any]:
        graphs.append(graph_module)
        return inner(graph_module, *rest)

    monkeypatch.setattr(backend, "compile_inner", keeping)
    return graphs
