"""QuantizedLoRA: one class to quantise a model, add adapters, compile, train and save."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_compile.errors import QuantizationBitsError

if TYPE_CHECKING:
    from torch import nn

    from qlora_compile.kernels.formats.base import BlockSize
    from qlora_compile.merging import MergeReport


USUAL_BITS = 4


class QuantizedLoRA:
    """A model with quantised frozen weights and trainable LoRA adapters, compiled.

    model: a transformers model, which is changed in place, or the path of one, which is loaded
    together with its tokenizer. quantization_bits: 4 stores the weights as NF4, 8 as INT8.
    quantize: the name of another format, in place of quantization_bits. Without either, the weights
    of a quantised checkpoint stay as they are stored, and others become NF4. double_quantize and
    block_size: as `optimize` takes them. alpha: 2 * rank if None. Other keywords (`strict`,
    `verify`, `scope`, and options of the format, such as `group_size`) go to
    `qlora_compile.optimize`.

    Raises, always before the model is changed:
        QuantizationBitsError: neither 4 nor 8 bits.
        UnknownFormatError: no format has that name.
        OutOfRangeError: rank, alpha or dropout cannot be used.
        ModelTypeError: the model is not a transformers model.
        AdaptersPresentError: the model has adapters already.
        AlreadyQuantizedError: another library has quantised the model.
        ModelNotFoundError: there is no model at the path.
        QloraCompileError: an error of `qlora_compile.optimize`.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        rank: int = 16,
        quantization_bits: int | None = None,
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

        bits = USUAL_BITS if quantization_bits is None else quantization_bits
        usual = next((each for each in FORMATS if each.bits == bits), None)
        if isinstance(bits, bool) or usual is None:
            raise QuantizationBitsError(value=bits)
        chosen = usual if quantize is None else format_named(quantize)
        from qlora_compile import api
        from qlora_compile.hf import loading, lora_settings

        lora_settings.require_adapter_settings(rank, 1 if alpha is None else alpha, dropout)
        plain: Any = model
        if isinstance(model, str | Path):
            config = loading.load_config(model)
            if (quantize or quantization_bits) is None and loading.is_quantised(config):
                chosen = None  # the weights stay as they are stored
            plain = loading.load_model(model, config=config)
            if tokenizer is None and loading.has_tokenizer(model):
                tokenizer = loading.load_tokenizer(model)
        lora_settings.require_plain_model(plain)
        lora = lora_settings.lora_config(
            plain,
            rank=rank,
            alpha=2 * rank if alpha is None else alpha,
            dropout=dropout,
            target_modules=target_modules,
        )
        self.tokenizer: Any = tokenizer
        self.model: Any = api.optimize(
            plain,
            lora,
            quantize=chosen and chosen.name,
            double_quantize=double_quantize and (chosen is None or chosen.has_double_quantize),
            block_size=block_size,
            **optimize_options,
        )

    def train(
        self,
        dataset: Any,
        *,
        objective: str | None = None,
        eval_dataset: Any = None,
        max_length: int | None = None,
        columns: dict[str, str] | None = None,
        reward: Any = None,
        on_nan: str = "stop",
        **options: Any,
    ) -> Any:
        """Train the adapters and return the Trainer's TrainOutput; a second call trains further.

        dataset, eval_dataset: the path of a file or folder, a Hub name, a `datasets.Dataset` or
        `DatasetDict`, streaming or not, a pandas DataFrame, a torch Dataset, or an iterable of
        strings or rows. docs/reference/data.md lists the columns that rows may have; chats are
        rendered by the tokenizer's template, and only what the assistant wrote is learnt. Rows of
        input_ids are trained on as they stand: without labels, a causal language model learns to
        predict its inputs. Models other than causal ones take input_ids or text, with the labels of
        their task.

        objective: the name of one in `hf/trainer/objectives`: "sft", the default, "dpo", "kto",
        "orpo", "grpo", "reward" or "classification". eval_dataset: evaluated after each epoch,
        unless options say otherwise; without it no row of `dataset` is held out. max_length: the
        tokens to cut rows at; None for 1,024, or fewer if the model has fewer positions. columns:
        our names of columns to the dataset's. reward: the reward function of "grpo", or a list of
        them. on_nan: "stop" raises NotFiniteError at a loss or gradient that is NaN or infinite,
        before the optimizer uses it; "skip" drops the gradients of that optimizer step and goes on.
        options: for the objective's configuration, such as `trl.SFTConfig`, a subclass of
        `transformers.TrainingArguments`; without an output_dir nothing is written, so call `save`
        afterwards. `hf.training.DEFAULTS` has the values of options that are not given.

        In one process, Ctrl-C or SIGTERM ends the training after the present step, saves a
        checkpoint there if there is an output_dir, and raises a KeyboardInterrupt that says how to
        go on. A second one stops at once. Several processes end at once.

        Raises, always before anything is trained (rows of a stream are checked when they come):
            TrainingOptionError: the configuration has no such option.
            TrainingOptionValueError: the value of an option cannot be used.
            OptionError: on_nan is neither "stop" nor "skip".
            OutOfRangeError: max_length is below 1.
            MissingPackageError: datasets or TRL is needed and not installed.
            DatasetTypeError: datasets of this type cannot be trained on.
            EmptyDatasetError: the dataset holds no examples.
            TokenizerMissingError: the dataset holds text, and there is no tokenizer.
            NoLossError: the model takes no labels.
            MissingLabelsError: the model needs labels that the dataset does not have.
            SequenceLengthError: max_length is more than the model can take.
            An error of `qlora_compile.row_errors` or `qlora_compile.data_errors`: a file cannot be
            read, or a row cannot be trained on.
        Raises in training:
            NotFiniteError: a loss or a gradient is NaN or infinite, and on_nan is "stop".
            TrainingMemoryError: memory ran out.
            CheckpointWriteError: a checkpoint cannot be written.
            LostProcessError: another process of the training has ended.
        """
        from qlora_compile.hf.training import FineTuning

        tuning = FineTuning(
            self.model,
            dataset,
            objective=objective,
            tokenizer=self.tokenizer,
            max_length=max_length,
            columns=columns,
            eval_dataset=eval_dataset,
            reward=reward,
            on_nan=on_nan,
            options=options,
        )
        self.tokenizer = tuning.trainer.processing_class  # with a template that the options name
        return tuning.train()

    def generate(self, prompt: str | list[dict[str, str]], **options: Any) -> str:
        """Return the text that the model writes after `prompt`.

        prompt: text, or the turns of a chat, [{"role": "user", "content": …}, …], which the
        tokenizer's chat template renders. options: for transformers' `generate`, by default at
        most 128 tokens, the most probable ones.

        Raises:
            TokenizerMissingError: there is no tokenizer.
            ChatTemplateError: the tokenizer has no chat template.
        """
        from qlora_compile.hf.generation import written

        return written(self.model, self.tokenizer, prompt, **options)

    def merge(self, path: str | Path, **options: Any) -> MergeReport:
        """Write the model with its adapters merged as plain safetensors, and the tokenizer if there
        is one; return how far the written model is from the trained one.

        options: of `qlora_compile.merge`, such as dtype and texts, and its errors.
        """
        from qlora_compile.merging import merge

        return merge(self.model, path, **{"tokenizer": self.tokenizer, **options})

    def push_to_hub(self, name: str, **options: Any) -> None:
        """Upload the adapters to the Hugging Face Hub, and the tokenizer if there is one.

        name: "OWNER/NAME". options: for PEFT's `push_to_hub`, such as private=True. Of several
        processes all call this, as `save`.
        """
        with _whole_adapters(self.model) as writes:
            if writes:
                self.model.push_to_hub(name, **options)
                if self.tokenizer is not None:
                    self.tokenizer.push_to_hub(name, **options)

    def save(self, path: str | Path) -> None:
        """Write the adapters as ordinary PEFT files, and the tokenizer if there is one.

        The folder is replaced as a whole, so that an interruption leaves the old or the new one;
        other files in it stay. Of several processes all call this: the first one writes, and the
        others give it their parts of the weights that FSDP2 or ZeRO-3 has spread.

        Raises:
            OutputDirectoryError: the path cannot be written.
            UnfinishedSaveError: writing has failed; what was there before is unchanged.
        """
        from qlora_compile.hf.saving.replacement import replaced

        with _whole_adapters(self.model) as writes:
            if not writes:
                return
            with replaced(Path(path), lambda _: True) as fresh:
                self.model.save_pretrained(str(fresh))
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(str(fresh))


@contextmanager
def _whole_adapters(model: Any) -> Iterator[bool]:
    """Yield whether this process writes: the first one does, which has the whole adapters."""
    from qlora_compile.hf.saving.whole_weights import whole_adapters

    with whole_adapters(model):
        yield os.environ.get("RANK", "0") == "0"
