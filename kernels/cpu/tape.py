"""Tape: the steps of a fused call on a CPU, recorded once and repeated without the Python code that
decides on them. It is to a CPU what a plan is to a GPU, replayed by Python."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from qlora_compile.kernels import workspace
from qlora_compile.kernels.cpu.native_function import NativeFunction
from qlora_compile.kernels.plans.slab import ALIGNMENT, scratch, touches
from qlora_compile.kernels.plans.steps import Source, UnplannableError
from qlora_compile.kernels.plans.tracer import Tracer

_aten = torch.ops.aten


@dataclass(frozen=True)
class _View:
    """A tensor of a recorded run. source, offset: the place of its first element, in bytes."""

    source: Source
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, base: Tensor, offset: int) -> Tensor:
        """Return this view of the memory of `base`, from `offset` bytes behind its beginning."""
        if base.dtype != self.dtype:
            base = base.view(self.dtype)
        start = base.storage_offset() + offset // self.dtype.itemsize
        return base.as_strided(self.shape, self.strides, start)


@dataclass(frozen=True)
class _Step:
    """A call of an operator or of a C++ function, with views in place of tensors. results: the
    values that an operator's results become, None for a tensor that it wrote to."""

    function: Any
    args: Sequence[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    results: Sequence[int | None] = ()

    @property
    def views(self) -> list[_View]:
        return [each for each in tree_leaves((self.args, self.kwargs)) if isinstance(each, _View)]

    @property
    def sources(self) -> set[Source]:
        made = (Source("value", each) for each in self.results if each is not None)
        return {each.source for each in self.views} | set(made)


class TapeRecorder(Tracer):
    """Collects the steps of what runs inside the context. known: the inputs, by index, of which the
    value is a part of the tape's key. whole: the view that each source itself is."""

    def __init__(self, inputs: Sequence[Tensor], known: Collection[int]) -> None:
        self.whole: dict[Source, _View] = {}
        super().__init__(inputs)
        self.steps: list[_Step] = []
        self._known = {Source("input", index) for index in known}

    def called(self, function: NativeFunction, arguments: Sequence[Any]) -> None:
        """Note a call of a C++ function that was made just now."""
        try:
            self.steps.append(_Step(function, self._viewed(arguments)))
        except UnplannableError as error:
            self.stopped(str(error))

    def operated(
        self, func: Any, args: Any, kwargs: dict[str, Any], results: list[int | None]
    ) -> None:
        self.steps.append(_Step(func, self._viewed(args), self._viewed(kwargs), results))

    def knows(self, func: Any, args: Any) -> bool:
        reads = func in (_aten.item.default, _aten._local_scalar_dense.default)
        return reads and self.place(args[0])[0] in self._known

    def _add(self, tensor: Tensor, source: Source) -> Any:
        self.whole[source] = _View(source, 0, tensor.dtype, tuple(tensor.shape), tensor.stride())
        return super()._add(tensor, source)

    def _viewed(self, arguments: Any) -> Any:
        """Return the arguments with views in place of tensors."""
        return tree_map_only(Tensor, self.view, arguments)

    def view(self, tensor: Tensor) -> _View:
        source, offset = self.place(tensor)
        return _View(source, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())


Run = Callable[[list[Any]], None]
"""A step that reads and writes the tensors of one repetition, a list."""


class Tape:
    """What `recorder` has recorded of a run with `inputs` that gave `results`.

    Each tensor of a repetition has a number: inputs, constants, the scratch memory and its views,
    results, values of operators, and views of all these. Raises UnplannableError if the run cannot
    be repeated. checked: whether a repetition was compared.
    """

    def __init__(
        self, recorder: TapeRecorder, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        if recorder.obstacle is not None:
            raise UnplannableError(recorder.obstacle)
        self.checked = False
        steps = recorder.steps
        returned = recorder.results(results)
        touched = touches(step.sources for step in steps)
        kept = set(returned)
        self._inside, size = scratch(touched, recorder.memory, kept)
        self._bytes = -(-size // ALIGNMENT) * ALIGNMENT
        self._allocated = [
            (tuple(result.shape), result.dtype)
            for source, result in zip(returned, results, strict=True)
            if source.kind == "memory"
        ]
        order = [
            *(Source("input", index) for index in range(len(inputs))),
            *(Source("constant", index) for index in range(len(recorder.constants))),
            *(source for source in returned if source.kind == "memory"),
            *(Source("value", index) for index in range(recorder.values)),
        ]
        self._numbers = {source: number for number, source in enumerate(order)}
        self._constants = recorder.constants
        self._slab = len(order)
        self._count = self._slab + 1
        # Memory that is returned is allocated in the shape of the result.
        whole = recorder.whole | {
            source: _View(source, 0, each.dtype, tuple(each.shape), each.stride())
            for source, each in zip(returned, results, strict=True)
            if source.kind == "memory"
        }
        self._views: dict[_View, int] = {}
        self._scratch_views: list[_View] = []
        early: list[tuple[int, _View]] = []
        self._steps: list[Run] = []
        for number, step in enumerate(steps):
            late: list[tuple[int, _View]] = []
            # C++ takes addresses, and needs no views.
            for view in () if isinstance(step.function, NativeFunction) else step.views:
                is_whole = view.source in self._numbers and whole[view.source] == view
                if view in self._views or is_whole:
                    continue
                self._views[view] = self._count
                self._count += 1
                if view.source in self._inside:
                    self._scratch_views.append(view)
                else:
                    (late if view.source.kind == "value" else early).append((self._count - 1, view))
            dropped = [
                self._numbers[source]
                for source, used in touched.items()
                if source.kind == "value" and used[-1] == number and source not in kept
            ]
            dropped += [
                n for view, n in self._views.items() if self._numbers.get(view.source) in dropped
            ]
            self._steps.append(self._run(step, late, dropped))
        self._early = [(number, view, self._numbers[view.source]) for number, view in early]
        self._returned = [
            (self._numbers[source], tuple(result.shape))
            for source, result in zip(returned, results, strict=True)
        ]
        self._scratch_numbers = [self._views[view] for view in self._scratch_views]

    def _number(self, view: _View) -> int:
        return self._views[view] if view in self._views else self._numbers[view.source]

    def _run(self, step: _Step, late: list[tuple[int, _View]], dropped: list[int]) -> Run:
        """Return what repeats a step. late: views to make before it. dropped: the numbers of
        tensors that are not needed after it."""
        before = [(number, view, self._numbers[view.source]) for number, view in late]
        if isinstance(step.function, NativeFunction):
            act = self._native(step.function, step.args)
        else:
            act = self._operator(step)

        if not before and not dropped:
            return act

        def run(tensors: list[Any]) -> None:
            for number, view, base in before:
                tensors[number] = view.of(tensors[base], view.offset)
            act(tensors)
            for number in dropped:
                tensors[number] = None

        return run

    def _native(self, function: NativeFunction, arguments: Sequence[Any]) -> Run:
        start = function.of_addresses
        template = [0 if isinstance(each, _View) else each for each in arguments]
        pointers = []
        for position, each in enumerate(arguments):
            if isinstance(each, _View):
                inside = each.source in self._inside
                base = self._slab if inside else self._numbers[each.source]
                pointers.append((position, base, each.offset + self._inside.get(each.source, 0)))

        def run(tensors: list[Any]) -> None:
            given = template.copy()
            for position, base, offset in pointers:
                given[position] = tensors[base].data_ptr() + offset
            start(*given)

        return run

    def _operator(self, step: _Step) -> Run:
        function, numbered = step.function, self._numbered
        args, kwargs = numbered(step.args), numbered(step.kwargs)
        results = [
            None if each is None else self._numbers[Source("value", each)] for each in step.results
        ]
        made = [(position, number) for position, number in enumerate(results) if number is not None]
        single = len(step.results) == 1

        def run(tensors: list[Any]) -> None:
            result = function(
                *[_filled(each, tensors) for each in args],
                **{name: _filled(each, tensors) for name, each in kwargs.items()},
            )
            for position, number in made:
                tensors[number] = result if single else result[position]

        return run

    def _numbered(self, arguments: Any) -> Any:
        """Return the arguments with the number of its tensor in place of each view."""
        return tree_map_only(_View, lambda view: _Number(self._number(view)), arguments)

    def repeat(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the results for other inputs of the same key."""
        tensors: list[Any] = [*inputs, *self._constants]
        for shape, dtype in self._allocated:
            tensors.append(torch.empty(shape, dtype=dtype))
        tensors += [None] * (self._count - len(tensors))
        if self._bytes:
            tensors[self._slab], views = workspace.divided(self, self._bytes, self._divide)
            for number, view in zip(self._scratch_numbers, views, strict=True):
                tensors[number] = view
        for number, view, base in self._early:
            tensors[number] = view.of(tensors[base], view.offset)
        for step in self._steps:
            step(tensors)
        return [
            tensors[number] if tensors[number].shape == shape else tensors[number].view(shape)
            for number, shape in self._returned
        ]

    def _divide(self, slab: Tensor) -> list[Tensor]:
        """Return the views of the scratch memory."""
        return [
            view.of(slab, view.offset + self._inside[view.source]) for view in self._scratch_views
        ]


class _Number(int):
    """The number of a tensor, among arguments that may be numbers themselves."""


def _filled(argument: Any, tensors: list[Any]) -> Any:
    if type(argument) is _Number:
        return tensors[argument]
    if type(argument) in (list, tuple):
        return [_filled(each, tensors) for each in argument]
    return argument
