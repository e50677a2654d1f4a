"""transformers' quantizer of our formats: packs a model while it is loaded, and loads packed ones.

`from_pretrained(path, quantization_config=QloraCompileConfig("nf4"))` packs each weight as soon as
it is read, merged and cast, so that only one weight at a time exists in 16 bits. Folders that
`qlora_compile.save` has written are loaded as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_compile.errors import MetaDeviceError
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.saving_errors import (
    DiskOffloadError,
    OldTransformersError,
    PackedFolderVersionError,
)

METHOD = "qlora_compile"
VERSION = 1
"""The version of the folders that `qlora_compile.save` writes."""


class QloraCompileConfig(QuantizationConfigMixin):
    """The format in which `from_pretrained` packs a model.

    format, options: as `quantize` and the format's options in `qlora_compile.optimize`, such as
    block_size=64, double_quantize=True or group_size=128. version: the version of a packed folder,
    in its config.json; the folder itself says how its weights are stored.

    Raises:
        UnknownFormatError, FormatOptionError, FormatOptionValueError, BlockSizeError,
        DoubleQuantizeError: the format or one of its options cannot be used.
        PackedFolderVersionError: the folder was written by another release.
    """

    def __init__(
        self, format: str | None = None, *, version: int | None = None, **options: Any
    ) -> None:
        options.pop("quant_method", None)
        self.quant_method: Any = METHOD
        if version is not None:
            if version != VERSION:
                raise PackedFolderVersionError(folder="the folder", value=version, known=VERSION)
            self.version = version
            return
        format_named(str(format)).usual_layout((1, 1), **options)
        self.format = format
        self.options = options

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Read what `to_dict` has written."""
        flat = {k: v for k, v in config_dict.items() if k != "options"}
        return super().from_dict({**flat, **config_dict.get("options", {})}, *args, **kwargs)


class PackingQuantizer(HfQuantizer):
    """Base class of the quantizer; the subclass that is registered knows the sites of a model."""

    requires_calibration = False
    quantization_config: Any
    _packing: Any = None

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the Linears and Conv1Ds to pack by the names of their modules, and the
        ExpertSites by the names of their Parameters."""

    @property
    def is_trainable(self) -> Any:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be loaded: called before files are looked for, and once more with the
        final device map.

        Raises:
            OldTransformersError: this transformers cannot find the files of a packed folder.
            DiskOffloadError: weights are to stay on disk.
            MetaDeviceError: weights that are to be packed would hold no data.
        """
        if self.pre_quantized and not hasattr(HfQuantizer, "update_attn_implementation"):
            raise OldTransformersError(value=transformers.__version__)
        places = device_map if isinstance(device_map, Mapping) else {}
        for site, place in places.items():
            if str(place) == "disk":
                raise DiskOffloadError(site=site or "the model")
            if str(place) == "meta" and not self.pre_quantized:
                raise MetaDeviceError(site=site or "the model")

    def is_serializable(self) -> Any:
        """Return False, because transformers' own saving would write codes as if they were weights.

        The model's `save_pretrained` is `qlora_compile.save`.
        """
        return False

    def update_attn_implementation(self, config: Any) -> Any:
        # transformers' only hook that gets the config before files are looked for.
        if self.pre_quantized:
            config.transformers_weights = f"{METHOD}.safetensors.index.json"
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        # A packed folder has the model's own names.
        return [] if self.pre_quantized else weight_conversions

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        # Imported here: this module is imported by transformers' own import, before PEFT can be.
        if self.pre_quantized:
            from qlora_compile.hf.checkpoints.folder import CheckpointFolder
            from qlora_compile.hf.checkpoints.packed import prepare

            prepare(model, CheckpointFolder(Path(checkpoint_files[0]).parent, METHOD))
        else:
            from qlora_compile.hf.packing import Packing

            config = self.quantization_config
            self._packing = Packing(model, *self.sites(model), config.format, config.options)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._packing is not None and param_name in self._packing

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self._packing.bytes_per_element(param_name)
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self._packing)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from qlora_compile.hf.packing import finish

        self._packing = None
        finish(model)
        return model


class _Pack(ConversionOps):
    """transformers' operation that packs one weight."""

    def __init__(self, packing: Any) -> None:
        self._packing = packing

    def convert(
        self, input_dict: Any, *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> Any:
        planes: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            planes |= self._packing.pack(name, weight)
            (missing_keys or set()).discard(name)
        return planes


def registered(quantizer: type[PackingQuantizer]) -> Any:
    """Register a quantizer, and the class of its configs, with transformers."""
    register_quantization_config(METHOD)(QloraCompileConfig)
    return register_quantizer(METHOD)(quantizer)
