"""Trains a block under settings of torch, one after another, and prints the error of each:
`python -m tests.code_cache_process NAME…`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._functorch import config as autograd_config

import qlora_compile
from qlora_compile.capture.regions import region_of, uninstall


class Block(nn.Module):
    """Computes like a decoder layer: gated, with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)).tanh() * self.factor


@contextlib.contextmanager
def without_vectors() -> Iterator[None]:
    os.environ["ATEN_CPU_CAPABILITY"] = "default"
    try:
        yield
    finally:
        del os.environ["ATEN_CPU_CAPABILITY"]


@contextlib.contextmanager
def without_flash_attention() -> Iterator[None]:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def halve_tanh(graph_module: Any, _: Any) -> Any:
    """Change results, as a pass over the joint graph: halve tanh."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
        with graph.inserting_after(node):
            half = graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.5))
        half.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(half, lambda user, half=half: user is not half)
    graph_module.recompile()
    return graph_module


HALVED = "a pass over the joint graph"
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default": contextlib.nullcontext,
    "donated buffers off": lambda: autograd_config.patch(donated_buffer=False),
    "no vector instructions": without_vectors,
    "no flash attention": without_flash_attention,
    "memory budget": lambda: autograd_config.patch(activation_memory_budget=0.2),
    HALVED: lambda: autograd_config.patch(joint_custom_pass=halve_tanh),
}
"""Settings that change what is generated for the block."""


def error(name: str) -> float:
    """Return the error, relative to eager's, of the output and of gradients taken twice through one
    graph."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up", "gate", "down"], init_lora_weights=False)
    model = qlora_compile.optimize(Block(), config, quantize="nf4", scope="model", tune="model")
    x = torch.randn(2, 4, 16, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with SETTINGS[name]():
        actual = results(model, x, leaves)
    for module in model.modules():
        if region_of(module) is not None:
            uninstall(module)
    if name == HALVED:
        # Its gradient is nobody's: the pass leaves tanh's derivative as it was.
        actual = actual[:1]
        model.get_base_model().factor = 0.5
    expected = results(model, x, leaves)[: len(actual)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))


def results(model: Any, x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    y = model(x)
    torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    errors = {}
    for setting in sys.argv[1:]:
        torch._dynamo.reset()
        errors[setting] = error(setting)
    print(json.dumps(errors))
