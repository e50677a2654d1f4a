"""Records what code allocates on the CPU, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Bytes of allocations. sizes: of each one. most: held at a time. held: still held at the end,
    including what the code returned. events: the outermost events of the profile."""

    sizes: list[int]
    most: int
    held: int
    events: list[Any]


def allocations(run: Callable[[], Any], *, warm: bool = True) -> Allocations:
    """Record the allocations of `run`, also inside torch's operators and compiled code. If `warm`,
    it runs once before, so that what is made once does not count."""
    if warm:
        run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    sizes = []
    held = most = 0
    events = event_tree(profiler)
    for size in allocation_sizes(events):
        held += size
        most = max(most, held)
        if size > 0:
            sizes.append(size)
    del result
    return Allocations(sizes, most, held, events)


def event_tree(profiler: profile) -> list[Any]:
    """The outermost events, each with those inside it."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return list(profiler.profiler.kineto_results.experimental_event_tree())


def allocation_sizes(events: list[Any]) -> list[int]:
    """Return the bytes of allocations in `events`, in the order of time; negative when freed."""
    found = sorted(_walk(events), key=lambda event: event.start_time_ns)
    return [event.typed[1].alloc_size for event in found]


def _walk(events: Any) -> Iterator[Any]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event
        yield from _walk(event.children)
