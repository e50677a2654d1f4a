"""ModelChoice: the model a command works on, the format of its weights, and its adapters."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_compile.checkpoint_errors import QuantisedModelError
from qlora_compile.errors import CausalModelError, FormatChoiceError, ModelNotFoundError
from qlora_compile.training.demo import demo_model_file

DEMO = "demo"

DEFAULT_FORMAT = "nf4"

ALL_LINEAR = "all-linear"


def check_format(text: str | None) -> None:
    """Check the text of a format, with or without options (int4:group_size=128); None, for no
    choice yet, passes.

    Raises:
        FormatChoiceError: there is no such format; the nearest names are suggested.
        FormatTextError, FormatOptionError, FormatOptionValueError: an option cannot be used.
    """
    if text is None:
        return
    from qlora_compile.kernels.formats.errors import FormatOptionError
    from qlora_compile.kernels.formats.formats import FORMATS, UNQUANTIZED, format_written

    name, options = format_written(text)
    known = [*(quant_format.name for quant_format in FORMATS), UNQUANTIZED]
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.3)
        closest = " or ".join(nearest) or UNQUANTIZED
        raise FormatChoiceError(value=name, closest=closest, known=", ".join(known))
    if name == UNQUANTIZED:
        for option, value in options.items():
            raise FormatOptionError(format=name, option=option, value=value, known="none")


@dataclass(frozen=True)
class ModelChoice:
    """A model, the format of its weights, and its adapters.

    model: a folder, a .gguf file, a Hub name, or "demo". format: as `check_format` takes it; None
    for "nf4", or for "none" if the model is a quantised checkpoint. alpha: None for 2 * rank. tune,
    block_size, logits_free_loss: as `optimize` takes them. targets: names of Linears, or
    "all-linear" alone. lora_options: other arguments of PEFT's LoraConfig.
    dtype: torch's name of the dtype to compute in, None for the machine's best. head: what the
    model computes, as `hf.trainer.objectives.base.Head`; labels: the names of classes.
    """

    model: str
    format: str | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    tune: str = "auto"
    block_size: int | None = None
    targets: tuple[str, ...] = (ALL_LINEAR,)
    lora_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    logits_free_loss: bool = False
    head: str = "causal"
    labels: tuple[str, ...] = ()

    def check(self) -> Any:
        """Check the choice without reading weights, and return the model's configuration.

        Raises:
            What `check_format` raises, OutOfRangeError, ModelNotFoundError, DemoModelMissingError,
            CausalModelError, TuneModeError, QuantisedModelError, AdapterConfigError,
            BlockSizeError, FormatOptionError: a value cannot be used.
        """
        check_format(self.format)
        check_model_path(self.model)
        from qlora_compile.hf import loading, lora_settings
        from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named
        from qlora_compile.tuning.modes import check_mode

        check_mode(self.tune)
        alpha = 1 if self.alpha is None else self.alpha
        patterns = self.lora_options.get("rank_pattern") or ()
        lora_settings.require_adapter_settings(self.rank, alpha, self.dropout, patterns)
        config = loading.load_config(self.source)
        name = loading.architecture(config)
        if self.head == "causal" and not loading.is_causal(name):
            raise CausalModelError(value=self.model, model=name)
        if loading.is_quantised(config) and self.format not in (None, UNQUANTIZED):
            raise QuantisedModelError(model=self.model, value=self.format)
        name, options = self.stored(config)
        if name != UNQUANTIZED:
            format_named(name).layout((1, 1), **options)
        return config

    def with_format(self, config: Any) -> ModelChoice:
        """Return this choice with its format settled. config: as `check` returns it."""
        if self.format is not None:
            return self
        from qlora_compile.hf import loading
        from qlora_compile.kernels.formats.formats import UNQUANTIZED

        return replace(self, format=UNQUANTIZED if loading.is_quantised(config) else DEFAULT_FORMAT)

    def stored(self, config: Any) -> tuple[str, dict[str, Any]]:
        """Return the name and the options of the format that weights are stored in."""
        from qlora_compile.kernels.formats.formats import format_written

        name, options = format_written(str(self.with_format(config).format))
        if self.block_size is not None:
            options["block_size"] = self.block_size
        return name, options

    @property
    def source(self) -> str | Path:
        return demo_model_file() if self.model == DEMO else self.model

    def optimized(self, config: Any, *, verify: bool = False) -> Any:
        """Load the model, quantise it, add adapters and compile it; return the optimised model.

        config: as `check` returns it. verify: as `optimize` takes it.
        """
        from qlora_compile.hf import lora_settings

        model = self.loaded(config)
        lora = lora_settings.lora_config(
            model,
            rank=self.rank,
            alpha=2 * self.rank if self.alpha is None else self.alpha,
            dropout=self.dropout,
            # A text alone would be a regular expression.
            target_modules=ALL_LINEAR if self.targets == (ALL_LINEAR,) else list(self.targets),
            **self.lora_options,
        )
        return self.packed(
            model, config, lora=lora, verify=verify, logits_free_loss=self.logits_free_loss
        )

    def loaded(self, config: Any) -> Any:
        """Load the model as it is stored. config: as `check` returns it."""
        from qlora_compile.hf import loading
        from qlora_compile.kernels.formats.formats import UNQUANTIZED

        return loading.load_model(
            self.source,
            config=config,
            dtype=self.dtype,
            head=self.head,
            labels=self.labels,
            # Without a format the weights stay as they are stored.
            keeps_blocks=self.stored(config)[0] == UNQUANTIZED,
        )

    def packed(self, model: Any, config: Any, **options: Any) -> Any:
        """Quantise and compile a model that `loaded` has returned. options: of `optimize`."""
        from qlora_compile import api
        from qlora_compile.kernels.formats.formats import UNQUANTIZED

        name, of_format = self.stored(config)
        quantize = None if name == UNQUANTIZED else name
        return api.optimize(model, quantize=quantize, tune=self.tune, **options, **of_format)


def quiet_choice(
    model: str,
    format: str | None,
    rank: int,
    alpha: float | None,
    dropout: float,
    tune: str = "auto",
) -> ModelChoice:
    """Return a choice for the command line, and silence the libraries.

    Raises:
        What `check_format` raises.
    """
    if model != DEMO:
        check_model_path(model)
    check_format(format)  # before transformers is imported, which takes seconds
    be_quiet()
    return ModelChoice(model, format, rank, alpha, dropout, tune)


def check_model_path(model: str) -> None:
    """Raise ModelNotFoundError, without an import, if `model` can only be a path and is missing."""
    path = Path(model)
    looks = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if (looks or path.suffix == ".gguf" or "\\" in model) and not path.exists():
        what = "file" if path.suffix == ".gguf" else "folder"
        raise ModelNotFoundError(
            value=model, problem=f"the {what} does not exist", remedy="check the path"
        )


def be_quiet() -> None:
    """Keep the libraries from printing."""
    # Without this, tokenizers warns when the process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # When imported, bitsandbytes recommends another package, which nothing here would use; torchao
    # lists libraries for GPUs that it cannot load, and calls what torch warns about.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from qlora_compile.hf.training import quiet

    quiet()
