"""CallInterpreter: compares each fused call of a graph with its specification, on its own inputs.

The errors of a whole block hide the error of a single kernel. The errors of one call are a rounding
or two, so that a wrong kernel shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from qlora_compile.kernels.attention import ATTENTION
from qlora_compile.kernels.specification import SPECIFIED
from qlora_compile.passes.calls import base_weights, is_fused
from qlora_compile.passes.experts import experts_weight
from qlora_compile.passes.nodes import stored_weight
from qlora_compile.verify.graph_results import Results, outputs_and_gradients


class CallInterpreter(Interpreter):
    """Runs a rewritten graph, and passes `on_call` three results of every call of one of our ops.

    The results are those of the specification in the call's dtypes, of the specification in
    float64, and of the op itself. names: the names of the graph's placeholders, in order.
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

    def run_node(self, n: Node) -> Any:
        specification: Any = SPECIFIED.get(n.target)
        if specification is not None:
            plain = self._results(n, functools.partial(specification, None), None)
            wide = functools.partial(specification, torch.float64)
            exact = self._results(n, wide, torch.float64)
            self._on_call(plain, exact, self._results(n, n.target, None))
        return super().run_node(n)

    def _results(self, n: Node, compute: Any, wide: torch.dtype | None) -> Results:
        args, structure = tree_flatten(self.fetch_args_kwargs_from_env(n)[0])
        if n.target is ATTENTION:
            schema = ATTENTION._schema.arguments
            sites, names = ["attention"], [f"{each.name} of attention" for each in schema]
        else:
            _, *others = tree_flatten(n.args)[0]
            weights = base_weights(n) if is_fused(n) else [experts_weight(n)]
            sites = [self._site(weight) for weight in weights]
            names = [f"the input of {', '.join(sites)}"]
            # The gradients of the whole block have the plain names.
            names += [f"{self._name(each)} in its own call" for each in others]
        results = outputs_and_gradients(
            lambda *values: compute(*tree_unflatten(values, structure)), names, args, wide
        )
        renamed = {f"output {i}": f"output of {site}" for i, site in enumerate(sites)}
        return {renamed.get(name, name): value for name, value in results.items()}

    def _name(self, value: Any) -> str:
        """Return the name of the placeholder that `value` is, or of which it is a cast or view."""
        return self._names.get(stored_weight(value), str(value))

    def _site(self, weight: Node) -> str:
        return self._name(weight).removesuffix(".weight").replace(".base_layer", "")
