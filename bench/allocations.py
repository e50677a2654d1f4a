"""What some code allocates on the CPU, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """sizes: bytes of every allocation. most: held at a time. held: still held at the end, where
    what the code returned counts."""

    sizes: list[int]
    most: int
    held: int


def allocations(run: Callable[[], Any]) -> Allocations:
    """Of `run`, inside torch's operators and compiled code too. It runs twice, first for what is
    made once."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    sizes = []
    held = most = 0
    events = _walk(profiler.profiler.kineto_results.experimental_event_tree())
    for event in sorted(events, key=lambda event: event.start_time_ns):
        size = event.typed[1].alloc_size
        held += size
        most = max(most, held)
        if size > 0:
            sizes.append(size)
    del result
    return Allocations(sizes, most, held)


def _walk(events: Any) -> Iterator[Any]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event
        yield from _walk(event.children)
