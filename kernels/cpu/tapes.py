"""The tapes of all fused calls on a CPU: recorded at a key's second use, compared at the third."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.kernels.call_times import Countdown, due
from qlora_compile.kernels.cpu import instructions, native_function
from qlora_compile.kernels.cpu.tape import Tape, TapeRecorder
from qlora_compile.kernels.linear_call import scaling_indices
from qlora_compile.kernels.plans.arguments import given_tensors, told_of, with_tensors
from qlora_compile.kernels.plans.bits import same_bits
from qlora_compile.kernels.plans.steps import UnplannableError
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.workspace import fresh_workspaces

Compute = Callable[..., list[Tensor]]

MOST = 1024
"""How many keys are kept; the least recently used goes first."""

_USED, _REFUSED = "used once", "refused"
_PLAIN = frozenset((Tensor, nn.Parameter))


class _State:
    """enabled: whether tapes are used. entries: a tape, or what is known of a key without one."""

    def __init__(self) -> None:
        self.enabled = True
        self.entries: OrderedDict[Any, Tape | str] = OrderedDict()
        self.lock = threading.Lock()
        self.countdown = Countdown()


_state = _State()


def repeated(name: str, choice: Choice, compute: Compute, *arguments: Any) -> list[Tensor]:
    """Return what the op `name` gives for its arguments: on a CPU by a tape, else by `compute`.

    choice: what `compute` runs. Some calls, which are timed to check the records, are computed all
    the same.
    """
    *_, x, _, _, _ = arguments
    if not _state.enabled or x.device.type != "cpu":
        return compute(*arguments)
    inputs = given_tensors(arguments)
    facts = _facts(arguments, inputs)
    if facts is None:
        return compute(*arguments)
    key = (name, choice, *facts)
    entry = _found(key)
    if isinstance(entry, Tape) and entry.checked:
        if _state.countdown.is_due():
            with due():
                return compute(*arguments)
        return _repeat(entry, inputs)
    if entry is _REFUSED:
        return compute(*arguments)
    if entry is None:
        _keep(key, _USED)
        return compute(*arguments)
    if isinstance(entry, Tape):
        return _compared(name, key, entry, compute, arguments, inputs)
    return _recorded(key, compute, arguments, inputs)


def forget() -> None:
    """Drop all tapes."""
    with _state.lock:
        _state.entries.clear()


@contextmanager
def off() -> Iterator[None]:
    """Have Python compute all calls inside the context."""
    before, _state.enabled = _state.enabled, False
    try:
        yield
    finally:
        _state.enabled = before


def _facts(arguments: Sequence[Any], inputs: Sequence[Tensor]) -> list[Any] | None:
    """Return what a tape depends on beside the op and the choice; None for a call that gets no
    tape."""
    tensors, text = arguments[-3], arguments[-1]
    facts: list[Any] = [
        *(text, instructions.level(), torch.get_num_threads()),
        *(torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()),
    ]
    for each in inputs:
        if type(each) not in _PLAIN or not each.numel():
            return None
        facts += (each.dtype, each.shape, each.stride())
    facts += [tensors[index].item() for index in scaling_indices(text)]
    return facts


def _found(key: Any) -> Tape | str | None:
    with _state.lock:
        entry = _state.entries.get(key)
        if entry is not None:
            _state.entries.move_to_end(key)
        return entry


def _keep(key: Any, entry: Tape | str) -> None:
    with _state.lock:
        _state.entries[key] = entry
        _state.entries.move_to_end(key)
        while len(_state.entries) > MOST:
            _state.entries.popitem(last=False)


def _recorded(
    key: Any, compute: Compute, arguments: Sequence[Any], inputs: list[Tensor]
) -> list[Tensor]:
    try:
        apart = _apart(inputs)
    except RuntimeError:  # Some of its elements share their memory.
        _keep(key, _REFUSED)
        return compute(*arguments)
    *_, tensors, seed, text = arguments
    # The inputs end with the tensors and, if there is dropout, the seed.
    first = len(inputs) - len(tensors) - (seed is not None)
    known = [first + index for index in scaling_indices(text)]
    recorder = TapeRecorder(apart, known)
    with native_function.recording(recorder), fresh_workspaces(), recorder:
        results = compute(*with_tensors(arguments, iter(apart)))
    try:
        _keep(key, Tape(recorder, apart, results))
    except UnplannableError:
        _keep(key, _REFUSED)
    return results


def _apart(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the inputs, or copies of those that share their storage with an earlier one, so that
    each address belongs to one of them."""
    seen: set[int] = set()
    apart = []
    for each in inputs:
        storage = each.untyped_storage()._cdata
        if storage in seen:
            each = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype).copy_(each)
        apart.append(each)
        seen.add(storage)
    return apart


def _compared(
    name: str,
    key: Any,
    tape: Tape,
    compute: Compute,
    arguments: Sequence[Any],
    inputs: list[Tensor],
) -> list[Tensor]:
    """Compute, and compare all bits with those that the tape gives for the same inputs, which in a
    model are another layer's than those of the recording."""
    results = compute(*arguments)
    try:
        again = _repeat(tape, inputs)
    except RuntimeError:  # One of torch's operators cannot take a view as it was taken.
        _keep(key, _REFUSED)
        return results
    if all(map(same_bits, again, results)):
        tape.checked = True
        return results
    _keep(key, _REFUSED)
    told = told_of(name, arguments)
    warnings.warn(
        f"{told}: repeating its steps gave other bits than computing anew, which goes on; please "
        "report this",
        stacklevel=2,
    )
    return results


def _repeat(tape: Tape, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not torch.is_autocast_enabled("cpu"):
        return tape.repeat(inputs)
    with torch.autocast("cpu", enabled=False):
        return tape.repeat(inputs)
