"""Reading: builds a model from a quantised checkpoint whose weights stay packed.

transformers builds the model on the meta device and loads what is not packed as usual: norms,
embeddings, heads, buffers, tied weights. A quantizer, transformers' hook for this purpose, removes
the parameters of packed weights before loading and inserts the packed modules afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_compile.checkpoint_errors import CheckpointError, StoredWeightError
from qlora_compile.errors import PackedWeightError
from qlora_compile.hf import experts, parameter_counts
from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import Settings, Source, StoredWeight
from qlora_compile.hf.checkpoints.targets import Lazy, Target, check_rest, targets
from qlora_compile.hf.saving.save import save_packed
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear

_METHOD = "qlora_compile_direct"


def quantization_settings(config: Any) -> Settings | None:
    """Return the `quantization_config` of a model's configuration as a mapping, None without."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else found.to_dict()


def read_model(
    model_class: Any,
    config: Any,
    folder: CheckpointFolder,
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Any:
    """Build a `model_class` of `config` from the checkpoint in `folder`, which `source` reads.

    dtype: that of all weights that are not packed, and of products with packed ones. Tensors are
    read one parameter at a time, after all headers have been checked.

    Raises CheckpointError if a tensor is missing or unfit; no model is left behind.
    """
    settings = quantization_settings(config) or {}
    try:
        stored = list(source.weights(folder, settings))
    except StoredWeightError as error:
        problem, remedy = str(error.fields["problem"]), str(error.fields["remedy"])
        raise CheckpointError(
            file=folder.path / CONFIG_NAME,
            tensor="quantization_config",
            problem=problem,
            remedy=remedy,
        ) from error
    direct = Direct(folder, source, stored, dtype, torch.device(device))
    model, info = model_class.from_pretrained(
        None,
        config=_plain(config),
        state_dict=direct.rest,
        quantization_config=DirectReading(direct),
        dtype=dtype,
        device_map={"": direct.device},
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise folder.error(missing[0], "the tensor is missing", AGAIN)
    return model


def _plain(config: Any) -> Any:
    """Return a copy of `config` without settings of quantisation."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    return config


class Direct:
    """A checkpoint that is being read.

    weights: what is stored packed. rest: the tensors for transformers to load, by their names in an
    unquantised checkpoint; each is read when it is indexed.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        source: Source,
        weights: Sequence[StoredWeight],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder, self.source = folder, source
        self.weights, self.dtype, self.device = weights, dtype, device
        packed = {name for weight in weights for name in weight.tensors.values()}
        self.rest: dict[str, Lazy] = {
            name: Lazy(header.shape, False, partial(folder.read, name))
            for name, header in folder.tensors.items()
            if name not in packed and not name.endswith(source.beside)
        }
        # Weights that no packed module can hold are decoded, for transformers to convert and place.
        self.rest |= {
            weight.name: Lazy(weight.shape, True, partial(self._decoded, weight))
            for weight in weights
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Direct:
        return self  # transformers copies the configuration that this travels in

    def _decoded(self, weight: StoredWeight) -> Tensor:
        packed = weight.read(self.folder)
        return format_named(packed.format).dequantize(packed, self.dtype).view(weight.shape)


class DirectReading(QuantizationConfigMixin):
    """Carries a `Direct` through `from_pretrained` to the quantizer."""

    def __init__(self, direct: Direct) -> None:
        self.quant_method: Any = _METHOD
        self.direct = direct


class DirectReader(HfQuantizer):
    """Removes the parameters that are stored packed, and inserts packed modules."""

    quantization_config: Any

    @property
    def is_trainable(self) -> Any:
        return True

    def is_serializable(self) -> Any:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        direct: Direct = self.quantization_config.direct
        self.targets = list(targets(model, direct.weights))
        for target in self.targets:
            _check_shape(direct.folder, target)
            for piece in target.pieces:
                del direct.rest[piece.name]
        check_rest(model, direct.folder, direct.rest, {target.name for target in self.targets})
        for target in self.targets:
            _take_out(model, target)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for target in self.targets:
            _put_in(model, target, self.quantization_config.direct)
        experts.adopt(target.site for target in self.targets if target.site is not None)
        parameter_counts.count_elements(model, model.modules())
        save_packed(model.modules())
        self.remove_quantization_config(model)
        return model


register_quantization_config(_METHOD)(DirectReading)
register_quantizer(_METHOD)(DirectReader)


def _check_shape(folder: CheckpointFolder, target: Target) -> None:
    """Raise CheckpointError unless the stored weights together have the target's shape."""
    rows = sum(math.prod(piece.shape[:-1]) for piece in target.pieces)
    for piece in target.pieces:
        if piece.shape[-1] != target.shape[1] or rows != target.shape[0]:
            first = next(iter(piece.tensors.values()))
            of = f" in {len(target.pieces)} parts" if len(target.pieces) > 1 else ""
            raise folder.error(
                first,
                f"it stores a weight {list(piece.shape)}{of}, but {target.name} is "
                f"{list(target.shape)}",
                f"{AGAIN}, and config.json",
            )


class _TakenOut(nn.Module):
    """Stands for a Linear while its weight is missing. The bias is loaded as usual."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
        # Some blocks, such as GPT-2's, initialise the weights of the Linears inside them.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


def _take_out(model: Any, target: Target) -> None:
    if target.site is not None:
        delattr(target.module, target.site.parameter)
        # Its initialisation would ask for the parameter.
        target.module._is_hf_initialized = True  # type: ignore[assignment]
    else:
        path = target.name.rpartition(".")[0]
        model.set_submodule(path, _TakenOut(target.module.bias))  # type: ignore[arg-type]


def _put_in(model: Any, target: Target, direct: Direct) -> None:
    """Put the packed weights in their places. Raises CheckpointError."""
    weights = [piece.read(direct.folder) for piece in target.pieces]
    packed = weights[0]
    if len(weights) > 1:
        try:
            packed = format_named(packed.format).stacked(weights)
        except PackedWeightError as error:
            problem = f"{target.name} is joined from {len(weights)} weights: {error}"
            remedy = "load the model in 16 bits and quantise it here"
            raise direct.folder.error(target.pieces[0].name, problem, remedy) from error
    packed = PackedWeight(
        packed.layout, {name: plane.to(direct.device) for name, plane in packed.planes.items()}
    )
    if target.site is not None:
        transposed = experts.is_transposed(target.module)
        module: Any = PackedExperts(packed, target.site.experts, transposed, target.dtype)
        experts.settle(target.module, target.site.parameter, module)
    else:
        path = target.name.rpartition(".")[0]
        bias: Any = model.get_submodule(path).bias
        module = QuantizedLinear(packed, bias, target.dtype).eval()
        model.set_submodule(path, module)
    module.origin = f"{direct.source.method} checkpoint"
