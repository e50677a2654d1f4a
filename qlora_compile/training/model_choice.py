"""ModelChoice: the model a command works on, the format of its weights, and its adapters."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_compile.checkpoint_errors import QuantisedModelError
from qlora_compile.errors import CausalModelError, FormatChoiceError
from qlora_compile.training.demo import demo_model_file

DEMO = "demo"

DEFAULT_FORMAT = "nf4"


def check_format(text: str) -> None:
    """Check the name of a format, which options may follow as in int4:group_size=128.

    Raises:
        FormatChoiceError: there is no such format; the nearest names are suggested.
        FormatTextError, FormatOptionError, FormatOptionValueError: an option cannot be used.
    """
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

    model: a folder, a .gguf file, a Hub name, or "demo". format: as `check_format` takes it.
    alpha: None for 2 * rank. tune: as `optimize` takes it.
    """

    model: str
    format: str = DEFAULT_FORMAT
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    tune: str = "auto"

    def check(self) -> Any:
        """Check the choice without reading weights, and return the model's configuration.

        Raises:
            What `check_format` raises, OutOfRangeError, ModelNotFoundError, DemoModelMissingError,
            CausalModelError, TuneModeError, QuantisedModelError: a value cannot be used.
        """
        check_format(self.format)
        from qlora_compile.hf import loading, training
        from qlora_compile.kernels.formats.formats import UNQUANTIZED
        from qlora_compile.tuning.modes import check_mode

        check_mode(self.tune)
        alpha = 1 if self.alpha is None else self.alpha
        training.require_adapter_settings(self.rank, alpha, self.dropout)
        config = loading.load_config(self.source)
        name = loading.architecture(config)
        if not loading.is_causal(name):
            raise CausalModelError(value=self.model, model=name)
        if loading.is_quantised(config) and self.format != UNQUANTIZED:
            raise QuantisedModelError(model=self.model, value=self.format)
        return config

    @property
    def source(self) -> str | Path:
        return demo_model_file() if self.model == DEMO else self.model

    def optimized(self, config: Any, *, verify: bool = False) -> Any:
        """Load the model, quantise it, add adapters and compile it; return the optimised model.

        config: as `check` returns it. verify: as `optimize` takes it.
        """
        from qlora_compile import api
        from qlora_compile.hf import loading, training
        from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_written

        name, options = format_written(self.format)
        # Without a format the weights stay as they are stored.
        keeps = name == UNQUANTIZED
        model = loading.load_model(self.source, config=config, keeps_blocks=keeps)
        lora = training.lora_config(
            model,
            rank=self.rank,
            alpha=2 * self.rank if self.alpha is None else self.alpha,
            dropout=self.dropout,
            target_modules="all-linear",
        )
        return api.optimize(
            model,
            lora,
            quantize=None if name == UNQUANTIZED else name,
            tune=self.tune,
            verify=verify,
            **options,
        )


def quiet_choice(
    model: str,
    format: str | None,
    rank: int,
    alpha: float | None,
    dropout: float,
    tune: str = "auto",
) -> ModelChoice:
    """Return a choice for the command line, and silence what the libraries would print.

    format: None for the default, and for "none" if the model is a quantised checkpoint.

    Raises:
        What `check_format` raises; ModelNotFoundError, if the format depends on the model.
    """
    if format is not None:
        check_format(format)  # before transformers is imported, which takes seconds
    # Without this, tokenizers warns when the process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # When imported, bitsandbytes recommends another package, which nothing here would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from qlora_compile.hf.training import quiet

    quiet()
    if format is None:
        from qlora_compile.hf import loading
        from qlora_compile.kernels.formats.formats import UNQUANTIZED

        packed = model != DEMO and loading.is_quantised(loading.load_config(model))
        format = UNQUANTIZED if packed else DEFAULT_FORMAT
    return ModelChoice(model, format, rank, alpha, dropout, tune)
