"""The graph that Dynamo would capture of a small module, in a tenth of its time.

A mode that watches torch's functions records what runs on fake tensors, in Dynamo's form. Python
values that depend on a shape are constants; `test_random_programs` compares the two captures.
"""

from __future__ import annotations

import operator
import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_OPERATORS = {
    "add": operator.add,
    "add_": operator.iadd,
    "mul": operator.mul,
    "matmul": operator.matmul,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
}
"""What reaches the mode by these names of methods was written as an operator: so programs do."""


def _is_view_without_grad(value: Tensor) -> bool:
    """Whether it is a view that was made under no_grad."""
    made = _autograd._get_creation_meta
    return value._is_view() and made(value) == _autograd.CreationMeta.NO_GRAD_MODE


class _Recording(TorchFunctionMode):
    def __init__(self, graph: Graph, names: dict[int, tuple[str, int]]) -> None:
        super().__init__()
        self.graph, self.names = graph, names
        self.nodes: dict[int, Node] = {}
        self.placeholders: dict[int, Node] = {}
        self.keep: list[Any] = []

    def node(self, value: Any) -> Any:
        """Return the node that stands for `value` at present, a placeholder made when first asked
        for."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            name, shared = self.names[id(value)]
            if shared not in self.placeholders:
                self.placeholders[shared] = self._placeholder(name, value)
            self.nodes[id(value)] = self.placeholders[shared]
        return self.nodes[id(value)]

    def _placeholder(self, name: str, value: Tensor) -> Node:
        after = next((n for n in self.graph.nodes if n.op != "placeholder"), self.graph._root)
        with self.graph.inserting_before(after):
            placeholder = self.graph.placeholder(re.sub(r"\W", "_", name))
        placeholder.meta["example_value"] = value
        placeholder.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name=name))
        return placeholder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        kwargs = {} if kwargs is None else kwargs
        attribute = name == "__get__"
        if attribute:
            name = func.__self__.__name__
        unchanged = func is torch._C._set_grad_enabled and args[0] == torch.is_grad_enabled()
        result = func(*args, **kwargs)
        if unchanged or (attribute and not isinstance(result, Tensor)):
            return result
        arguments = tree_map(self.node, tuple(args)), tree_map(self.node, kwargs)
        if attribute:
            node = self.graph.call_function(getattr, (arguments[0][0], name))
        elif not hasattr(torch.Tensor, name) or getattr(torch.Tensor, name) is not func:
            node = self.graph.call_function(func, *arguments)
        elif name in _OPERATORS:
            node = self.graph.call_function(_OPERATORS[name], *arguments)
        else:
            node = self.graph.call_method(name, *arguments)
        if id(result) in self.nodes:
            # What hands back an argument stands for a value of its own, as in Dynamo. A view from
            # under no_grad that has been written to has no view with gradients.
            with torch.set_grad_enabled(not _is_view_without_grad(result)):
                result = result.view_as(result) if result.requires_grad else result.detach()
        node.meta["example_value"] = result
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
        elif isinstance(result, (list, tuple)):
            for index, item in enumerate(result):
                got = self.graph.call_function(operator.getitem, (node, index))
                got.meta["example_value"] = item
                self.nodes[id(item)] = got
        self.keep.append(result)
        return result


def record(module: nn.Module, x: Tensor) -> GraphModule:
    """Return the torch-level graph of `module(x)`; placeholders are named as Dynamo's sources
    are."""
    mode = FakeTensorMode()
    # No leaf, so that programs may write to it.
    fake_x = mode.from_tensor(x.detach(), static_shapes=True)
    fake_x = fake_x.requires_grad_(x.requires_grad).clone()
    names = {id(fake_x): ("L['x']", id(x))}
    tensors = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            # One object for each name: what is shared goes by the name that is read first.
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
            tensors[name] = fake.requires_grad_(tensor.requires_grad)
            names[id(fake)] = (source_name(module, name), id(tensor))
    graph = Graph()
    with _Recording(graph, names) as recording:
        outputs = torch.func.functional_call(module, tensors, (fake_x,), tie_weights=False)
    graph.output(tree_map(recording.node, outputs))
    return _LazyGraphModule({}, graph)


def source_name(module: nn.Module, name: str) -> str:
    """Return Dynamo's name for the parameter or buffer `name` of the module it traces."""
    *path, leaf = name.split(".")
    kind = "_parameters" if leaf in module.get_submodule(".".join(path))._parameters else "_buffers"
    modules = "".join(f"._modules['{part}']" for part in path)
    return f"L['self']{modules}.{kind}['{leaf}']"
