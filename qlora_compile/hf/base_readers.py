"""Kinds of LoRA that read or change the base weight when they are attached. Of a packed weight they
would read the codes."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from qlora_compile.errors import AdapterConfigError

_INITIALISATIONS = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
_VARIANTS = ("kasa_config", "use_bdlora", "velora_config")


def initialises_from_base(config: LoraConfig) -> bool:
    """Whether `init_lora_weights` makes the factors of the base weight."""
    chosen: Any = config.init_lora_weights
    return isinstance(chosen, str) and chosen.lower().startswith(_INITIALISATIONS)


def check_reads_no_base(config: LoraConfig) -> None:
    """Raise AdapterConfigError if attaching `config` reads or changes the base weight."""
    fields = [name for name in _VARIANTS if getattr(config, name, None)]
    # The orthogonal one takes the dtype of the base weight.
    reads = initialises_from_base(config) or config.init_lora_weights == "orthogonal"
    fields += ["init_lora_weights"] * reads
    remedy = "attach the adapter to the full-precision model first, then optimise the PeftModel"
    for field in fields:
        value = getattr(config, field)
        raise AdapterConfigError(field=f"{field} over packed weights", value=value, remedy=remedy)
