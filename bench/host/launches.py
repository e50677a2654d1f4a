"""Counts on a CPU how many kernels torch would launch on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

_STARTS_NOTHING = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "detach"),
        *("view", "_unsafe_view", "view_as", "reshape", "_reshape_alias", "as_strided", "alias"),
        *("t", "transpose", "permute", "expand", "expand_as", "unsqueeze", "squeeze", "slice"),
        *("select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "unflatten"),
        *("flatten", "contiguous", "to", "lift_fresh", "result_type", "is_nonzero", "numpy_T"),
        *("_local_scalar_dense", "item", "requires_grad_", "detach_", "type_as", "movedim"),
        *("swapaxes", "matrix_H", "mT", "size", "_version", "unfold", "diagonal", "view_as_real"),
        *("resolve_conj", "resolve_neg", "stride", "can_cast", "promote_types", "real", "dropout"),
    )
)
"""Operators that only make views, allocate memory or read it on the host, or that call no other
operator if there is nothing to do."""


def torch_launches(run: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """Return how often `run` calls each operator that is a kernel on a GPU: (outside, inside of
    qlora_compile's ops). A kernel of Inductor's, or an operator of bitsandbytes', counts as one."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    outside: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for event in profiled.events() or ():
        if event.cpu_parent is None:
            _count(event, outside, inside)
    return outside, inside


def _count(event: Any, here: Counter[str], inside: Counter[str]) -> bool:
    """Count the innermost operators at or below `event` that start something; return whether any
    does."""
    here = inside if event.name.startswith("qlora_compile::") else here
    started = [_count(child, here, inside) for child in event.cpu_children]
    operator = event.name.startswith(("aten::", "bitsandbytes::")) or "cpp_fused" in event.name
    if any(started) or not operator or event.name in _STARTS_NOTHING:
        return any(started)
    here[event.name] += 1
    return True
