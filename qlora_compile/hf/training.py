"""Fine-tunes with the Hugging Face Trainer, and computes losses of held-out sequences."""

import contextlib
import difflib
import inspect
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from qlora_compile.errors import (
    AdaptersPresentError,
    ModelTypeError,
    OutOfRangeError,
    TrainingOptionError,
)
from qlora_compile.hf.dataset import label_names, prepare
from qlora_compile.hf.interruption import Interruption
from qlora_compile.hf.loading import is_causal

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
_LEARNING_RATE = 2e-4  # usual for LoRA; TrainingArguments' default suits full fine-tuning


def require_plain_model(model: object) -> None:
    """Check that a model is a transformers model that has no adapters yet.

    Raises:
        ModelTypeError: it is no transformers model.
        AdaptersPresentError: it is a PeftModel.
    """
    if isinstance(model, PeftModel):
        raise AdaptersPresentError(value=type(model).__name__)
    if not isinstance(model, PreTrainedModel):
        raise ModelTypeError(value=type(model).__name__)


def require_adapter_settings(rank: object, alpha: object, dropout: object) -> None:
    """Check LoRA's rank, alpha and dropout.

    Raises:
        OutOfRangeError: one of them cannot be used.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise OutOfRangeError(name="rank", value=rank, allowed="an integer of 1 or more")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise OutOfRangeError(name="alpha", value=alpha, allowed="a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise OutOfRangeError(name="dropout", value=dropout, allowed="a number from 0 to below 1")


def lora_config(
    model: Any, *, rank: int, alpha: float, dropout: float, target_modules: Any
) -> LoraConfig:
    """Return PEFT's configuration for a model; it also trains the new head of a classifier.

    Raises:
        OutOfRangeError: rank, alpha or dropout cannot be used.
    """
    require_adapter_settings(rank, alpha, dropout)
    name = type(model).__name__
    task = TaskType.CAUSAL_LM if is_causal(name) else None
    for ending, known in _TASKS.items():
        if name.endswith(ending):
            task = known
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  PEFT divides it, any number will do
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type=task,
    )


def fine_tune(
    model: Any,
    dataset: Any,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    observer: "StepObserver | None" = None,
    options: dict[str, Any],
) -> tuple[Any, list[dict[str, float]]]:
    """Train the parameters that require gradients; return the TrainOutput and the log history.

    dataset, max_length: as `QuantizedLoRA.train` takes them. options: for TrainingArguments; the
    defaults here are to report to no service, to save nothing without an output_dir, a learning
    rate of 2e-4, and the CPU if there is no accelerator. observer: watches the steps; with one
    nothing is printed.

    Raises:
        TrainingOptionError: TrainingArguments has no such option.
        DatasetTypeError, EmptyDatasetError, TokenizerMissingError, NoLossError,
        MissingLabelsError, or an error of a row: the dataset cannot be trained on.
        TrainingInterrupt: Ctrl-C stopped the training.
    """
    require_known_options(options)
    rows, batching = prepare(dataset, model, tokenizer, max_length)
    interruption = Interruption(options.get("output_dir"))
    with _output_directory(options) as directory:
        arguments = TrainingArguments(**{**_defaults(options, model), "output_dir": directory})
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=batching,
            processing_class=tokenizer,
            callbacks=[interruption, *([observer] if observer else [])],
        )
        if observer:
            trainer.remove_callback(PrinterCallback)
        # Of several processes each would stop after another step.
        alone = arguments.world_size == 1
        with interruption.watching(trainer) if alone else contextlib.nullcontext():
            output = trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return output, trainer.state.log_history


def require_known_options(options: dict[str, Any]) -> None:
    """Raise TrainingOptionError, which names the nearest, for an option that TrainingArguments does
    not have."""
    known = list(inspect.signature(TrainingArguments).parameters)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            closest = ", ".join(near) or "none that is similar; see its documentation"
            raise TrainingOptionError(value=name, closest=closest)


@torch.no_grad()
def sequence_losses(model: Any, sequences: Sequence[list[int]], batch_size: int) -> list[float]:
    """Return the mean next-token loss of each token sequence, in evaluation mode.

    The model's training mode is restored. Losses are in nats per token.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        for start in range(0, len(sequences), batch_size):
            ids = torch.tensor(sequences[start : start + batch_size], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            losses.extend(loss.mean(dim=1).tolist())
    finally:
        model.train(was_training)
    return losses


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch as the Trainer does, so that new adapters are reproducible."""
    set_seed(seed)


def quiet() -> None:
    """Silence transformers, except for errors, so that the terminal shows only our progress."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # PEFT reads an attribute that transformers is renaming; a user can do nothing about that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # PEFT looks for a config.json to see if embeddings were resized. A GGUF file has none beside
    # it, and none were resized.
    warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)


class StepObserver(TrainerCallback):
    """Times every optimiser step, and calls on_step(step, steps in all, loss or None)."""

    def __init__(self, on_step: Callable[[int, int, float | None], None]) -> None:
        self.on_step = on_step
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _synchronize()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        self.on_step(state.global_step, state.max_steps, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.on_step(state.global_step, state.max_steps, float(logs["loss"]))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _defaults(options: dict[str, Any], model: Any) -> dict[str, Any]:
    accelerated = torch.accelerator.is_available()
    defaults = {
        "report_to": "none",
        "save_strategy": "no" if options.get("output_dir") is None else "steps",
        "learning_rate": _LEARNING_RATE,
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
        # Trainer would look for the names in PeftModel's forward, which has none.
        "label_names": label_names(model),
    }
    return {**defaults, **options}


@contextlib.contextmanager
def _output_directory(options: dict[str, Any]) -> Iterator[str]:
    if options.get("output_dir") is not None:
        yield str(options["output_dir"])
        return
    with tempfile.TemporaryDirectory(prefix="qlora_compile-") as directory:
        yield directory
