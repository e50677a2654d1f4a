"""QuantizedLoRA: one class to quantise a model, add adapters, compile, train and save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_compile.errors import QuantizationBitsError

if TYPE_CHECKING:
    from torch import nn

    from qlora_compile.kernels.formats.base import BlockSize


class QuantizedLoRA:
    """A model with quantised frozen weights and trainable LoRA adapters, compiled.

    model: a transformers model, which is changed in place, or the path of one, which is loaded
    together with its tokenizer. quantization_bits: 4 stores the weights as NF4, 8 as INT8.
    quantize: the name of another format, in place of quantization_bits. double_quantize and
    block_size: as `optimize` takes them. alpha: 2 * rank if None. Other keywords (`strict`,
    `verify`, `scope`, and options of the format, such as `group_size`) go to
    `qlora_compile.optimize`.

    Raises, always before the model is changed:
        QuantizationBitsError: neither 4 nor 8 bits.
        UnknownFormatError: no format has that name.
        OutOfRangeError: rank, alpha or dropout cannot be used.
        ModelTypeError: the model is no transformers model.
        AdaptersPresentError: the model has adapters already.
        AlreadyQuantizedError: another library has quantised the model.
        ModelNotFoundError: there is no model at the path.
        QloraCompileError: an error of `qlora_compile.optimize`.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        rank: int = 4,
        quantization_bits: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        tokenizer: Any = None,
        quantize: str | None = None,
        block_size: BlockSize | None = None,
        double_quantize: bool = True,
        **optimize_options: Any,
    ) -> None:
        # torch, transformers and PEFT take seconds to import, so only once they are needed.
        from qlora_compile.kernels.formats.formats import FORMATS, format_named

        usual = next((each for each in FORMATS if each.bits == quantization_bits), None)
        if isinstance(quantization_bits, bool) or usual is None:
            raise QuantizationBitsError(value=quantization_bits)
        if quantize is not None:
            usual = format_named(quantize)
        from qlora_compile import api
        from qlora_compile.hf import loading, training

        training.require_adapter_settings(rank, 1 if alpha is None else alpha, dropout)
        plain: Any = model
        if isinstance(model, str | Path):
            plain = loading.load_model(model)
            if tokenizer is None and loading.has_tokenizer(model):
                tokenizer = loading.load_tokenizer(model)
        training.require_plain_model(plain)
        lora = training.lora_config(
            plain,
            rank=rank,
            alpha=2 * rank if alpha is None else alpha,
            dropout=dropout,
            target_modules=target_modules,
        )
        self.tokenizer = tokenizer
        self.model: Any = api.optimize(
            plain,
            lora,
            quantize=usual.name,
            double_quantize=double_quantize and usual.has_double_quantize,
            block_size=block_size,
            **optimize_options,
        )

    def train(self, dataset: Any, *, max_length: int | None = None, **options: Any) -> Any:
        """Train the adapters and return the Trainer's TrainOutput; a second call trains further.

        dataset: a `datasets.Dataset` or pandas DataFrame with a column input_ids or text, a torch
        Dataset or an iterable of token dicts, or one of strings. Text needs a tokenizer; blank
        texts are left out. Without labels, a causal language model learns to predict its inputs,
        and where a text is not cut, to end it with the end-of-sequence token. max_length: where to
        cut texts, in tokens; None for the model's own limit. options: for
        `transformers.TrainingArguments`; without an output_dir nothing is saved.

        Ctrl-C ends the training after the present step, saves a checkpoint there if there is an
        output_dir, and raises a KeyboardInterrupt that says how to go on. A second one stops at
        once.

        Raises, always before anything is trained (rows of a stream are checked when they come):
            TrainingOptionError: TrainingArguments has no such option.
            OutOfRangeError: max_length is below 1.
            DatasetTypeError: the dataset is of no kind that can be trained on.
            EmptyDatasetError: the dataset holds no examples.
            TokenizerMissingError: the dataset holds text, and there is no tokenizer.
            NoLossError: the model takes no labels.
            MissingLabelsError: the model needs labels that the dataset does not have.
            SequenceLengthError: max_length is more than the model can take.
            An error of `qlora_compile.row_errors`: a row cannot be trained on.
        """
        from qlora_compile.hf.training import fine_tune

        output, _ = fine_tune(
            self.model, dataset, tokenizer=self.tokenizer, max_length=max_length, options=options
        )
        return output

    def save(self, path: str | Path) -> None:
        """Write the adapters as ordinary PEFT files, and the tokenizer if there is one.

        Raises:
            OutputDirectoryError: the path cannot be written.
        """
        from qlora_compile.outputs import writable_directory

        folder = writable_directory(Path(path))
        self.model.save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
