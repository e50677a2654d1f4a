"""What some code allocates on the CPU, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """sizes: bytes of every allocation. most: held at a time. held: still held at the end, where
    what the code returned counts. events: all of the profile, the outermost ones."""

    sizes: list[int]
    most: int
    held: int
    events: list[Any]


def allocations(run: Callable[[], Any], *, warm: bool = True) -> Allocations:
    """Of `run`, inside torch's operators and compiled code too. Where `warm`, it runs once before,
    for what is made once."""
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
    """Bytes of what is allocated in `events`, in the order of time; freed ones are negative."""
    found = sorted(_walk(events), key=lambda event: event.start_time_ns)
    return [event.typed[1].alloc_size for event in found]


def _walk(events: Any) -> Iterator[Any]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event
        yield from _walk(event.children)
