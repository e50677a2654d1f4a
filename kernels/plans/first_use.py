"""Records a plan at the second use of its key, and compares its first replay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.gpu.launch import recording_plan
from qlora_compile.kernels.gpu.launch_step import is_hooked
from qlora_compile.kernels.plans.arguments import given_tensors, told_of, with_tensors
from qlora_compile.kernels.plans.bits import same_bits
from qlora_compile.kernels.plans.encoding import encoded
from qlora_compile.kernels.plans.recording import Recorder
from qlora_compile.kernels.plans.steps import UnplannableError
from qlora_compile.kernels.workspace import fresh_workspaces, release

_ops = torch.ops.qlora_plans

_kept: dict[int, Any] = {}
"""The compiled kernels of all plans, by function, kept because a kernel without references is
unloaded. Triton's own caches hold as many."""


def recorded(
    name: str, compute: Callable[..., list[Tensor]], compares: bool
) -> Callable[..., list[Tensor]]:
    """Return a function that computes the op `name` as `compute` does, and makes a plan of this for
    the key that C++ has looked up in this thread."""

    def run(*arguments: Any) -> list[Tensor]:
        inputs = given_tensors(arguments)
        if is_hooked() or _ops.is_capturing(inputs[0].device):
            return compute(*arguments)
        told = told_of(name, arguments)
        # Copies with storages of their own, so that each pointer belongs to one tensor.
        apart = [_ops.alias(each) for each in inputs]
        recorder = Recorder(apart)
        # The run takes scratch memory of its own; so will the plan.
        release()
        results = None
        try:
            with recording_plan(recorder), fresh_workspaces(), recorder:
                results = compute(*with_tensors(arguments, iter(apart)))
        except torch.OutOfMemoryError as error:
            _ops.refuse(f"{told}: {str(error).splitlines()[0]}")
        if results is None:
            # With shared scratch memory, which is less. Not where the error is handled: until the
            # handler ends, the error holds the failed run's memory.
            return compute(*arguments)
        try:
            if recorder.obstacle is not None:
                raise UnplannableError(recorder.obstacle)
            numbers, names = encoded(told, recorder, len(inputs), results)
            _ops.make(numbers, names, recorder.constants, inputs[0].device)
            if compares:
                _compare(told, inputs, results, numbers[1])
        except (UnplannableError, RuntimeError) as error:
            _ops.refuse(f"{told}: {str(error).splitlines()[0]}")
            return results
        _kept.update((each.function, each) for each in recorder.kernels)
        _ops.keep()
        return results

    return run


def _compare(told: str, inputs: list[Tensor], results: list[Tensor], slab: int) -> None:
    """Replay the plan that was made just now, and compare all bits but those of NaNs.

    This takes the memory of the results and of the slab once more; with less memory than that, or
    if the process has a memory limit, nothing is compared.

    Raises UnplannableError, after a warning, if bits differ.
    """
    if not _fits(inputs[0].device, slab + sum(each.nbytes for each in results)):
        return
    try:
        replayed = _ops.replay(inputs)
    except torch.OutOfMemoryError:
        return
    if all(map(same_bits, replayed, results)):
        return
    message = f"{told}: replaying the launches gave other bits than Python's launches"
    warnings.warn(f"{message}; Python goes on launching; please report this", stacklevel=2)
    raise UnplannableError("the replay gave other bits")


def _fits(device: torch.device, size: int) -> bool:
    if device.type != "cuda":
        return True
    if torch.cuda.get_per_process_memory_fraction(device) < 1:
        return False
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= torch.cuda.mem_get_info(device)[0] + cached
