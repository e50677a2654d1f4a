"""The parameters that a block's next call computes with: adapters that are off take no part."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def parameters_in_use(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of `module`, without those of adapters that are disabled, merged or not
    active. PEFT may leave `requires_grad` on these too."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    by_adapter: tuple[str, ...] = ()
    active: list[str] = []
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        by_adapter = module.adapter_layer_names
        if not module.disable_adapters and not module.merged_adapters:
            active = module.active_adapters
    for name, child in module._modules.items():
        if name in by_adapter and isinstance(child, nn.ModuleDict):
            for adapter in active:
                if adapter in child:
                    yield from parameters_in_use(child[adapter])
        elif name in by_adapter and isinstance(child, nn.ParameterDict):
            yield from (child[adapter] for adapter in active if adapter in child)
        elif child is not None:
            yield from parameters_in_use(child)
