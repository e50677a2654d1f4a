"""Packing: packs a model's weights one by one while transformers loads them into a skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qlora_compile.hf import experts, parameter_counts
from qlora_compile.hf.checkpoints.packed import place_linear
from qlora_compile.hf.conv1d import Conv1D, LinearSite, as_linear, features
from qlora_compile.hf.saving.folders.packed import PackedFolder
from qlora_compile.hf.saving.save import save_packed
from qlora_compile.kernels.formats.options import DOUBLE
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear


class Packing:
    """The weights of a skeleton that are packed in `format` with its `options`.

    Linears become packed modules without data at once, as transformers looks for the places of the
    planes. Until the codes arrive, `weight` is the skeleton's own, as transformers may cast what it
    reads to the dtype that it finds there. Experts become packed once their weight, which has a
    name of its own, has been read.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, LinearSite],
        expert_sites: Mapping[str, experts.ExpertSite],
        format: str,
        options: Mapping[str, Any],
    ) -> None:
        self._format = format_named(format)
        self._options = {DOUBLE: self._format.has_double_quantize, **options}
        self._experts = expert_sites
        self._linears = {f"{name}.weight": type(linear) for name, linear in linears.items()}
        self._bytes: dict[str, float] = {}
        for name, linear in linears.items():
            layout = self._format.layout(features(linear), **self._options)
            own = as_linear(linear)
            module = place_linear(model, name, own, layout)
            self._bytes[f"{name}.weight"] = module.weight.nbytes / own.weight.numel()
            module.weight = own.weight.requires_grad_(False)

    def __contains__(self, name: str) -> bool:
        return name in self._linears or name in self._experts

    def bytes_per_element(self, name: str) -> float:
        """Return the bytes of an element: of experts as packed, of a Linear's codes alone."""
        return self._bytes.get(name, self._format.bits / 8)

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Return the planes of a Linear's `weight` by their names in the model; place those of
        experts.

        Raises:
            WeightShapeError, WeightValueError: the weight cannot be packed.
        """
        if name in self._experts:
            site = self._experts[name]
            packed = PackedExperts.from_parameter(
                nn.Parameter(weight, requires_grad=False),
                self._format.name,
                transposed=experts.is_transposed(site.module),
                site=name,
                **self._options,
            )
            delattr(site.module, site.parameter)
            experts.settle(site.module, site.parameter, packed)
            for module in (*packed.modules(), site.module):
                module._is_hf_initialized = True  # pyright: ignore
            return {}
        weight = weight.t() if self._linears[name] is Conv1D else weight
        layout = self._format.layout((weight.shape[0], weight.shape[1]), **self._options)
        site = name.removesuffix(".weight")
        packed = self._format.pack(weight, layout, site, **self._options)
        return dict(PackedFolder().tensors(f"{site}.", packed, weight.dtype))


def finish(model: nn.Module) -> None:
    """Complete a model whose packed weights transformers has loaded."""
    for module in model.modules():
        # The folder has no such weight: transformers has initialised it.
        if isinstance(module, QuantizedLinear) and module.weight.is_floating_point():
            module.store(module.quant_format.pack(module.weight, Layout.parse(module.layout)))
    sites = experts.sites(dict(model.named_modules())).values()
    packed = [site for site in sites if isinstance(site.weight, PackedExperts)]
    for site in packed:
        site.module.requires_grad_(False)  # their biases, which are loaded as trained ones
    experts.adopt(packed)
    parameter_counts.count_elements(model, model.modules())
    save_packed(model.modules())
