"""Recorder: notes what a run of a variant starts, allocates and returns, and where pointers
point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_compile.kernels.gpu.launch import Launch
from qlora_compile.kernels.gpu.launch_step import launch_step
from qlora_compile.kernels.plans.steps import Source, Step, UnplannableError, operator_step

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


class Recorder(TorchDispatchMode):
    """Collects the steps of what runs inside the context, in one thread, without changing it.

    inputs: the tensors of the call, each with storage of its own. obstacle: why the run cannot be
    replayed, None if it can. memory: the bytes of each allocated piece, `Source("memory", …)`.
    values: how many results of operators there are. kernels: the compiled kernels.

    Storages are distinguished by identity while they live. Memory that a run has freed can come
    back only as a storage that is allocated inside the context, and is then noted anew.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.device = inputs[0].device
        self.steps: list[Step] = []
        self.constants: list[Tensor] = []
        self.memory: list[int] = []
        self.values = 0
        self.kernels: list[Any] = []
        self.obstacle: str | None = None
        self._roots: dict[int, _Root] = {}
        self._stream = self._current_stream()
        for index, tensor in enumerate(inputs):
            self._add(tensor, Source("input", index))

    def launched(self, launch: Launch, compiled: Any) -> None:
        """Note a launch that was made just now; compiled: Triton's CompiledKernel."""
        try:
            if self._current_stream() != self._stream:
                raise UnplannableError("it uses a second stream")
            self.steps.append(launch_step(launch, compiled, self.place))
            self.kernels.append(compiled)
        except UnplannableError as error:
            self.obstacle = self.obstacle or str(error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        try:
            self._note(func, args, kwargs, result)
        except UnplannableError as error:
            self.obstacle = self.obstacle or str(error)
        return result

    def place(self, tensor: Tensor) -> tuple[Source, int]:
        """Return where the first element of `tensor` lies. A storage that was neither given nor
        allocated inside is a constant, which the plan keeps alive."""
        root = self._roots.get(_storage(tensor))
        if root is None:
            if tensor.device != self.device:
                raise UnplannableError(f"it reads a tensor on {tensor.device}")
            self.constants.append(tensor)
            root = self._add(tensor, Source("constant", len(self.constants) - 1))
        return root.source, tensor.data_ptr() - root.address

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
        if func is _aten.lift_fresh.default or torch.Tag.nondeterministic_seeded in func.tags:
            raise UnplannableError(f"{func} gives other values at every call")
        returned = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(each, Tensor) for each in returned):
            raise UnplannableError(f"{func} returns a value that the host would wait for")
        results: list[int | None] = []
        places = self.place
        first = self.values
        for is_fresh in fresh:
            results.append(self.values if is_fresh else None)
            self.values += is_fresh
        self.steps.append(operator_step(func, args, kwargs, results, places, self.device))
        for tensor, is_fresh in zip(made, fresh, strict=True):
            if is_fresh:
                self._add(tensor, Source("value", first))
                first += 1

    def _add(self, tensor: Tensor, source: Source) -> _Root:
        root = self._roots[_storage(tensor)] = _Root(source, tensor.data_ptr())
        return root

    def _current_stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
