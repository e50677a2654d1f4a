"""Adapters: attached, loaded, switched, merged, deleted, disabled, scaled."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests.life.pair import TARGETS, Pair, Strategy
from tests.test_equality import lora

NAMES = ("default", "second", "third")


@dataclass(frozen=True)
class Attach:
    """add_adapter; saved: modules_to_save"""

    name: str
    targets: tuple[str, ...]
    dora: bool = False
    saved: tuple[str, ...] = ()

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        free = [name for name in NAMES if name not in pair.adapters]
        if not free or pair.merged:
            return None
        # Stock PEFT takes the scales from an 8-bit layer that has run, to measure it for DoRA.
        dora = st.just(False) if pair.start.base == "bnb-8bit" else st.booleans()
        return st.builds(
            Attach,
            st.just(free[0]),
            st.sampled_from((pair.start.targets, *TARGETS)),
            dora,
            st.sampled_from(((), ("lm_head",), ("post_attention_layernorm",))),
        )

    def apply(self, pair: Pair) -> None:
        config = lora(
            r=2,
            target_modules=list(self.targets),
            use_dora=self.dora,
            modules_to_save=list(self.saved) or None,
        )
        pair.both(lambda model: model.add_adapter(self.name, config))
        # PEFT makes an adapter in the dtype of the base weight, which may be rounded or not.
        pair.share_parameters()


@dataclass(frozen=True)
class Reload:
    """save_pretrained and load_adapter, each model loading what the other wrote"""

    saved: str
    name: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        free = [name for name in NAMES if name not in pair.adapters]
        if not free or pair.merged:
            return None
        return st.builds(Reload, st.sampled_from(pair.adapters), st.just(free[0]))

    def apply(self, pair: Pair) -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, side) for side in ("stock", "ours")]
            for model, path in zip((pair.stock, pair.ours), paths, strict=True):
                model.save_pretrained(path, selected_adapters=[self.saved])
            if self.saved != "default":
                paths = [path / self.saved for path in paths]
            theirs, mine = (load_file(path / "adapter_model.safetensors") for path in paths)
            assert theirs.keys() == mine.keys()
            assert all(torch.equal(mine[name], value) for name, value in theirs.items())
            for model, path in zip((pair.ours, pair.stock), paths, strict=True):
                model.load_adapter(path, self.name, is_trainable=True)
        pair.share_parameters()


@dataclass(frozen=True)
class Switch:
    """set_adapter, also to several"""

    names: tuple[str, ...]

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        if len(pair.adapters) < 2:
            return None
        adapters = st.sampled_from(pair.adapters)
        return st.builds(Switch, st.lists(adapters, min_size=1, max_size=2, unique=True).map(tuple))

    def apply(self, pair: Pair) -> None:
        if len(self.names) == 1:
            pair.both_merging(lambda model: model.set_adapter(self.names[0]))
        else:
            pair.both_merging(lambda model: model.base_model.set_adapter(list(self.names)))


@dataclass(frozen=True)
class Delete:
    """delete_adapter"""

    name: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # Stock PEFT goes on with what the first layer that had the adapter has left, or fails.
        layers = [m for m in pair.stock.modules() if isinstance(m, LoraLayer)]
        alone = {name for m in layers if len(m.lora_A) == 1 for name in m.lora_A}
        names = [name for name in pair.adapters if name not in alone]
        if len(pair.adapters) < 2 or pair.merged or not names:
            return None
        return st.builds(Delete, st.sampled_from(names))

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.delete_adapter(self.name))


@dataclass(frozen=True)
class Merge:
    """merge_adapter"""

    safe: bool = False

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        # Stock unmerges a disabled adapter in its next forward.
        return None if pair.disabled else st.builds(Merge, st.booleans())

    def apply(self, pair: Pair) -> None:
        pair.both_merging(lambda model: model.merge_adapter(safe_merge=self.safe))


@dataclass(frozen=True)
class Unmerge:
    """unmerge_adapter"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(Unmerge)

    def apply(self, pair: Pair) -> None:
        pair.both_merging(lambda model: model.unmerge_adapter())


@dataclass(frozen=True)
class Disable:
    """disable_adapter_layers, which has the next forward unmerge"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return None if pair.disabled else st.builds(Disable)

    def apply(self, pair: Pair) -> None:
        pair.stock.base_model.disable_adapter_layers()
        pair.ours.base_model.disable_adapter_layers()
        if pair.merged:
            pair.stock_merging(lambda model: model.unmerge_adapter())


@dataclass(frozen=True)
class Enable:
    """enable_adapter_layers"""

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(Enable) if pair.disabled else None

    def apply(self, pair: Pair) -> None:
        pair.both(lambda model: model.base_model.enable_adapter_layers())


@dataclass(frozen=True)
class Scale:
    """set_scale, scale_layer or unscale_layer, on one adapter layer or on all"""

    method: str
    factor: float | None
    layer: int | None

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        method = st.sampled_from(("set_scale", "scale_layer", "unscale_layer"))
        factor = st.sampled_from((0.5, 1.5, 0.0))
        return method.flatmap(
            lambda method: st.builds(
                Scale,
                st.just(method),
                st.none() if method == "unscale_layer" else factor,
                st.none() | st.integers(0, len(pair.layers) - 1),
            )
        ).filter(lambda each: not (pair.merged and each.factor == 0.0))

    def apply(self, pair: Pair) -> None:
        def scale(model: Any) -> None:
            layers = [module for module in model.modules() if hasattr(module, "lora_A")]
            for layer in layers if self.layer is None else [layers[self.layer]]:
                if self.method == "set_scale":
                    for name in layer.active_adapters:
                        layer.set_scale(name, self.factor)
                else:
                    getattr(layer, self.method)(self.factor)

        pair.both(scale)
