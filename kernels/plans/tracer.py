"""Tracer: notes the operators, allocations and results of a run, and where pointers point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_compile.kernels.plans.steps import Source, UnplannableError

_aten = torch.ops.aten
_EMPTY = {
    *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
}


@dataclass(frozen=True)
class _Root:
    """The source that a storage is, and the address from which places in it are counted."""

    source: Source
    address: int


class Tracer(TorchDispatchMode):
    """Follows what runs inside the context, in one thread, without changing it.

    inputs: the tensors of the call, each with storage of its own. obstacle: why the run cannot be
    repeated, None if it can. memory: the bytes of each allocated piece, `Source("memory", …)`.
    values: how many results of operators there are. constants: the tensors that were neither given
    nor made inside.

    Storages are distinguished by identity while they live. Memory that a run has freed can come
    back only as a storage that is allocated inside the context, and is then noted anew.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.device = inputs[0].device
        self.constants: list[Tensor] = []
        self.memory: list[int] = []
        self.values = 0
        self.obstacle: str | None = None
        self._roots: dict[int, _Root] = {}
        for index, tensor in enumerate(inputs):
            self._add(tensor, Source("input", index))

    def operated(
        self, func: Any, args: Any, kwargs: dict[str, Any], results: list[int | None]
    ) -> None:
        """Take a call of an operator. results: the values that its results become, None for a
        tensor that it wrote to. Raises UnplannableError."""
        raise NotImplementedError

    def knows(self, func: Any, args: Any) -> bool:
        """Whether a call reads a value that is the same in every repetition."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        try:
            self._note(func, args, kwargs, result)
        except UnplannableError as error:
            self.stopped(str(error))
        return result

    def stopped(self, reason: str) -> None:
        """Take a reason why the run cannot be repeated."""
        self.obstacle = self.obstacle or reason

    def place(self, tensor: Tensor) -> tuple[Source, int]:
        """Return where the first element of `tensor` lies. A storage that was neither given nor
        allocated inside is a constant, which stays alive with whatever repeats the run."""
        root = self._roots.get(_storage(tensor))
        if root is None:
            if tensor.device != self.device:
                raise UnplannableError(f"it reads a tensor on {tensor.device}")
            self.constants.append(tensor)
            root = self._add(tensor, Source("constant", len(self.constants) - 1))
        # A tensor without elements has no address.
        return root.source, tensor.data_ptr() - root.address if tensor.numel() else 0

    def results(self, tensors: Sequence[Tensor]) -> list[Source]:
        """Return the source of each result.

        Raises UnplannableError if a result has no contiguous storage of its own.
        """
        sources = [self.result(each) for each in tensors]
        if len(set(sources)) < len(sources):
            raise UnplannableError("two of its results share their storage")
        return sources

    def result(self, tensor: Tensor) -> Source:
        """Return the memory or the value whose whole content is `tensor`, a result.

        Raises UnplannableError if the tensor has no contiguous storage of its own.
        """
        root = self._roots.get(_storage(tensor))
        if (
            root is None
            or root.source.kind not in ("memory", "value")
            or not tensor.is_contiguous()
            or tensor.nbytes != tensor.untyped_storage().nbytes()
        ):
            raise UnplannableError("it returns a tensor without a contiguous storage of its own")
        return root.source

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        for tensor in made:
            if tensor.device != self.device:
                raise UnplannableError(f"{func} makes a tensor on {tensor.device}")
        storages = set(map(_storage, given))
        fresh = [_storage(each) not in storages for each in made]
        if func in _EMPTY:
            self.memory.append(result.untyped_storage().nbytes())
            self._add(result, Source("memory", len(self.memory) - 1))
            return
        writes = func._schema.is_mutable
        if made and not writes and not any(fresh):
            return  # a view
        if self.knows(func, args) or not (given or made):
            return  # what a repetition does not have to do again
        if func is _aten.lift_fresh.default or torch.Tag.nondeterministic_seeded in func.tags:
            raise UnplannableError(f"{func} gives other values at every call")
        returned = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(each, Tensor) for each in returned):
            raise UnplannableError(f"{func} returns a value that the host would wait for")
        results: list[int | None] = []
        first = self.values
        for is_fresh in fresh:
            results.append(self.values if is_fresh else None)
            self.values += is_fresh
        self.operated(func, args, kwargs, results)
        for tensor, is_fresh in zip(made, fresh, strict=True):
            if is_fresh:
                self._add(tensor, Source("value", first))
                first += 1

    def _add(self, tensor: Tensor, source: Source) -> _Root:
        root = self._roots[_storage(tensor)] = _Root(source, tensor.data_ptr())
        return root


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
