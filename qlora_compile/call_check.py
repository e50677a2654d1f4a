"""Single fused calls on the inputs they have in a graph, next to their specification.

Errors of a whole block hide what one kernel adds to them; those of one call are a rounding or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qlora_compile.graph_results import Results
from qlora_compile.kernels.op import qlora_linear_group
from qlora_compile.passes.nodes import PER_SIBLING, calls, stored_weight
from qlora_compile.specified_ops import specified_linear

Call = dict[str, Any]
"""The arguments of `qlora_linear` by their names."""

_TENSORS = 6  # of those, before the constants


class CallInterpreter(Interpreter):
    """Runs a rewritten graph without dropout and calls `on_call` with the results of every fused
    call in it: by its specification in its own dtypes, by that in float64, and its own. names: of
    the graph's placeholders. Gradients are among the results if they are enabled now.
    """

    def __init__(
        self,
        rewritten: GraphModule,
        names: Iterable[str],
        on_call: Callable[[Results, Results, Results], None],
    ) -> None:
        super().__init__(rewritten)
        placeholders = rewritten.graph.find_nodes(op="placeholder")
        self._names = dict(zip(placeholders, names, strict=True))
        self._on_call = on_call
        self._trains = torch.is_grad_enabled()

    def run(self, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **options)

    def run_node(self, n: Node) -> Any:
        linears = calls(n)
        if linears:
            sites = [self._site(stored_weight(call["planes"][0])) for call in linears]
            group = [
                {name: self.map_nodes_to_values(value, n) for name, value in call.items()}
                for call in linears
            ]
            self._on_call(
                self._results(_specified, group, sites, None),
                self._results(_specified, group, sites, torch.float64),
                self._results(_fused, group, sites, None),
            )
        return super().run_node(n)

    def _site(self, weight: Node) -> str:
        return self._names[weight].removesuffix(".weight").removesuffix(".base_layer")

    def _results(
        self, compute: Any, group: Sequence[Call], sites: list[str], wide: torch.dtype | None
    ) -> Results:
        leaves: dict[str, Tensor] = {}

        def leaf(name: str, value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            value = value.detach().to(wide or value.dtype, copy=True)
            leaves[f"gradient of {name}"] = value.requires_grad_(self._trains)
            return value

        x = leaf(f"the input of {', '.join(sites)}", group[0]["x"])
        with torch.autocast(group[0]["x"].device.type, enabled=False):
            with torch.set_grad_enabled(self._trains):
                outputs = compute(
                    [
                        call
                        | {"x": x}
                        | {
                            name: leaf(f"{site}.{name}", call[name])
                            for name in ("lora_a", "lora_b")
                        }
                        for site, call in zip(sites, group, strict=True)
                    ],
                    wide,
                )
            results: Results = {
                f"output of {site}": output.detach()
                for site, output in zip(sites, outputs, strict=True)
            }
            if self._trains:
                weights = [_weight(output) for output in outputs]
                found = torch.autograd.grad(
                    outputs, list(leaves.values()), weights, allow_unused=True
                )
                results |= dict(zip(leaves, found, strict=True))
        return results


def _weight(output: Tensor) -> Tensor:
    """The gradient of an output, exact in every dtype and unlike that of a sibling."""
    generator = torch.Generator().manual_seed(output.shape[-1])
    weight = torch.randn(output.shape, generator=generator).to(torch.bfloat16)
    return weight.to(output.device, output.dtype)


def _fused(group: Sequence[Call], wide: torch.dtype | None) -> list[Tensor]:
    call: Call = group[0] | {name: [each[name] for each in group] for name in PER_SIBLING}
    call["planes"] = [plane for each in group for plane in each["planes"]]
    return qlora_linear_group(*call.values())


def _specified(group: Sequence[Call], wide: torch.dtype | None) -> list[Tensor]:
    return [_specified_call(call, wide) for call in group]


def _specified_call(call: Call, wide: torch.dtype | None) -> Tensor:
    constants = list(call.values())[_TENSORS:]
    x, a, b = call["x"], call["lora_a"], call["lora_b"]
    y = specified_linear(wide, x, call["planes"], call["bias"], None, None, None, *constants)
    if a is None:
        return y
    dtype = wide or call["lora_dtype"]
    low_rank = x.to(dtype) @ a.to(dtype).T
    return (y + call["scaling"] * (low_rank @ b.to(dtype).T)).to(wide or call["out_dtype"])
