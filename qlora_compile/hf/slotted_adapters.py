"""SlottedAdapters: updates the slots of a block's adapter layers before every call of the block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qlora_compile.hf.adapter_slots import SlottedLayer, version
from qlora_compile.hf.adapters import wrapper_at
from qlora_compile.hf.conv1d import LinearSite


class SlottedAdapters:
    """The adapter layers that are at the `sites` inside `block` at the time of each call."""

    def __init__(self, block: nn.Module, sites: Iterable[str]) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        self._block = [block] * ("" in sites)
        self._read: _Read | None = None
        for site in sites:
            if not isinstance(wrapper_at(block, site), (LinearSite, BaseTunerLayer)):
                # A weight of experts, whose adapters wrap the module that has it.
                site = site.rpartition(".")[0]
            parent, _, leaf = site.rpartition(".")
            if site and (holder := wrapper_at(block, parent)) is not None:
                place = (holder.__dict__["_modules"], leaf)
                self._places += [] if place in self._places else [place]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}

    def forget(self) -> None:
        """Have the next refresh look at the modules again. Call this if a module may have been put
        into the block, or been given another forward, since the last refresh."""
        self._read = None

    def refresh(self, *, by_slots: bool) -> None:
        """Update the slots; without `by_slots`, have PEFT's own forward compiled instead."""
        read = self._read  # other threads may take it away
        if by_slots and read is not None and read.lasts():
            return
        outermost = [*self._block, *(children.get(leaf) for children, leaf in self._places)]
        layers = list(_layers(outermost))
        for layer in layers:
            layer.unmerge_disabled()
            if by_slots:
                layer.refresh_slots()
            else:
                layer.forget_slots()
        self._read = _Read(layers) if by_slots and _is_readable(layers) else None


def _layers(outermost: list[Any]) -> Iterator[Any]:
    for module in outermost:
        while isinstance(module, SlottedLayer):
            yield module
            # Several adapted weights wrap one module of experts.
            module = getattr(module, "base_layer", None)


def _is_readable(layers: list[Any]) -> bool:
    """Whether the layers have everything that `_Read` compares. A factor that is computed, as by a
    parametrization, lacks its weight."""
    return all(layer.__dict__.keys() >= _SETTINGS for layer in layers) and all(
        isinstance(each._parameters.get("weight"), Tensor) and "bias" in each._parameters
        for layer in layers
        for _, a, b, _ in layer.active_parts()
        for each in (a, b)
    )


_SETTINGS = {
    *("_slots_state", "_disable_adapters", "_active_adapter", "merged_adapters"),
    *("scaling", "lora_variant"),
}
_settings = itemgetter(*sorted(_SETTINGS))


class _Read:
    """The values that the last refresh read. While all of them stay the same, the slots need no
    refresh. Each comparison is a loop in C, which takes a third of a Python loop's time."""

    def __init__(self, layers: list[Any]) -> None:
        active = [parts for layer in layers for _, *parts in layer.active_parts()]
        parts = [*chain.from_iterable(active)]
        self._factors = [each._parameters for a, b, _ in active for each in (a, b)]
        self._tensors = [*chain.from_iterable(map(dict.values, self._factors))]
        dropouts = [each for each in parts if isinstance(each, nn.Dropout)]
        weights = [a.weight for a, *_ in active]
        states = [layer.__dict__ for layer in layers]
        scalings = [each for layer in layers for each in layer.scaling.values()]
        written = [each for each in scalings if isinstance(each, Tensor)]
        self._checks: list[tuple[Callable[[Any], Any], list[Any], list[Any]]] = [
            (_settings, states, [tuple(map(_copied, _settings(each))) for each in states]),
            (type, parts, [*map(type, parts)]),
            (attrgetter("p", "training"), dropouts, [(each.p, each.training) for each in dropouts]),
            (version, written, [version(each) for each in written]),
            (attrgetter("device", "dtype"), weights, [(w.device, w.dtype) for w in weights]),
        ]

    def lasts(self) -> bool:
        tensors = [*chain.from_iterable(map(dict.values, self._factors))]
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and all([*map(get, objects)] == found for get, objects, found in self._checks)
        )


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict) else value
