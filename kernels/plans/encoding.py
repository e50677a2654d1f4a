"""Encodes a recording as the numbers and names from which plan.cpp reads a plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora_compile.kernels.plans.recording import Recorder
from qlora_compile.kernels.plans.slab import scratch, touches
from qlora_compile.kernels.plans.steps import Numbers, Source, dtype_code

SLAB = Source("memory", -1)


def encoded(
    call: str, recorder: Recorder, inputs: int, results: Sequence[Tensor]
) -> tuple[list[int], list[str]]:
    """Return the numbers and the names of the plan that `recorder` has recorded.

    call: the name for errors. inputs: how many tensors the call has. Raises UnplannableError if a
    result has no storage of its own.
    """
    returned = recorder.results(results)
    touched = touches(
        (*step.sources, *(Source("value", each) for each in step.results))
        for step in recorder.steps
    )
    kept = set(returned)
    inside, slab = scratch(touched, recorder.memory, kept)
    order = [
        *(Source("input", index) for index in range(inputs)),
        *(Source("constant", index) for index in range(len(recorder.constants))),
        SLAB,
        *(source for source in returned if source.kind == "memory"),
        *(Source("value", index) for index in range(recorder.values)),
    ]
    number_of = {source: number for number, source in enumerate(order)}

    def resolved(numbers: Numbers) -> list[int]:
        found: list[int] = []
        moved = 0
        for each in numbers:
            if isinstance(each, Source):
                moved = inside.get(each, 0)
                found.append(number_of[SLAB if each in inside else each])
            else:
                # The number after a source is the offset in its memory.
                found.append(int(each) + moved)
                moved = 0
        return found

    numbers = [inputs, slab, len(order), len(results)]
    for source, tensor in zip(returned, results, strict=True):
        value = number_of[source] if source.kind == "value" else -1
        numbers += [value, dtype_code(tensor.dtype), tensor.dim(), *tensor.shape]
    numbers.append(len(recorder.steps))
    names = [call]
    for index, step in enumerate(recorder.steps):
        released = [
            number_of[source]
            for source, steps in touched.items()
            if source.kind == "value" and steps[-1] == index and source not in kept
        ]
        names += step.names
        numbers += [int(step.is_operator), *resolved(step.numbers), len(released), *released]
    return numbers, names
