"""FineTuning: trains a model by TRL's trainer of an objective, or by transformers' Trainer."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sized
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from qlora_compile.data_errors import NothingLearntError
from qlora_compile.errors import MissingPackageError, OutOfRangeError
from qlora_compile.hf.adapters import base_model
from qlora_compile.hf.dataset import (
    checked_length,
    is_tokenized,
    label_names,
    prepare,
    rows_of,
)
from qlora_compile.hf.interruption import Interruption
from qlora_compile.hf.loading import is_causal
from qlora_compile.hf.rows import longest_row
from qlora_compile.hf.trainer import preparation
from qlora_compile.hf.trainer.class_labels import labelled
from qlora_compile.hf.trainer.failures import check_parallelism, failures_named, on_one_gpu
from qlora_compile.hf.trainer.finished import is_finished, load_finished
from qlora_compile.hf.trainer.finite_steps import STOP, check_on_nan, finite_steps
from qlora_compile.hf.trainer.objectives.base import Objective
from qlora_compile.hf.trainer.objectives.classification import CLASSIFICATION
from qlora_compile.hf.trainer.objectives.registry import objective_named
from qlora_compile.hf.trainer.objectives.sft import SFT
from qlora_compile.hf.trainer.options import check_options, with_max_length
from qlora_compile.hf.trainer.saved_digests import SavedDigests

LEARNING_RATE = 2e-4  # usual for LoRA; TrainingArguments' default suits full fine-tuning
MAX_LENGTH = 1024  # tokens; TRL's

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # of all steps
    "save_steps": 100,
    "save_total_limit": 2,
    "seed": 0,
    "report_to": "none",
}
"""Options of every training, from Python and from the command line, that are not the trainer's."""

TRL_DEFAULTS: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,  # the model's own dtype counts
}
"""Options of TRL's trainers for which transformers has these defaults."""


class FineTuning:
    """One training of a model. trainer: the Trainer, ready to train.

    The arguments are those of `QuantizedLoRA.train`. objective: None for supervised fine-tuning of
    a causal language model, and for what the labels say of any other model. observer: watches the
    steps; with one nothing is printed. patience: the number of evaluations without a better one
    after which training ends; None for any. on_nan: as `finite_steps` takes it.

    Raises what `QuantizedLoRA.train` raises, and UnskippableStepError, before anything is trained.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        *,
        objective: str | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        columns: Mapping[str, str] | None = None,
        eval_dataset: Any = None,
        reward: Any = None,
        observer: StepObserver | None = None,
        patience: int | None = None,
        on_nan: str = STOP,
        options: Mapping[str, Any],
    ) -> None:
        check_on_nan(on_nan)
        chosen = objective_named(objective or "sft")
        dataset, eval_dataset = rows_of(dataset, columns), rows_of(eval_dataset, columns)
        as_it_stands = is_tokenized(dataset) or (objective is None and not _is_causal(model))
        if chosen is SFT and as_it_stands:
            chosen = CLASSIFICATION
        trainer_class, config_class = _loaded(chosen)
        self.interruption = Interruption(options.get("output_dir"))
        self._temporary = None
        if options.get("output_dir") is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="qlora_compile-")
        defaults = _defaults(chosen, options)
        if eval_dataset is not None:
            defaults["eval_strategy"] = "epoch"
        check_options(with_max_length(options, max_length, chosen), config_class, defaults)
        watchers: list[TrainerCallback] = [self.interruption, SavedDigests()]
        watchers += [observer] if observer else []
        if patience is not None:
            watchers.append(EarlyStoppingCallback(patience))

        def arguments(**own: Any) -> Any:
            given = {**defaults, **own, **options}
            if self._temporary is not None:
                given["output_dir"] = self._temporary.name
            return on_one_gpu(config_class(**given))

        make = _plain_trainer if chosen is CLASSIFICATION else _trl_trainer
        self.trainer: Any = make(
            model,
            dataset,
            eval_dataset,
            tokenizer=tokenizer,
            max_length=checked_length(max_length, base_model(model)),
            reward=reward,
            objective=chosen,
            trainer_class=finite_steps(trainer_class, on_nan),
            arguments=arguments,
            callbacks=watchers,
        )
        check_parallelism(self.trainer.args)
        self._resume = options.get("resume_from_checkpoint")
        if observer:
            self.trainer.remove_callback(PrinterCallback)

    def train(self) -> Any:
        """Train, and return the TrainOutput.

        Raises:
            TrainingInterrupt: Ctrl-C or SIGTERM stopped the training.
            NotFiniteError: a loss or a gradient is NaN or infinite, and on_nan is "stop".
            TrainingMemoryError, CheckpointWriteError: memory or disk space ran out.
        """
        if self._resume is not None and is_finished(self.trainer, self._resume):
            return load_finished(self.trainer, self._resume)
        # Several processes would each stop after another step.
        alone = self.trainer.args.world_size == 1
        watching = self.interruption.watching(self.trainer) if alone else nullcontext()
        with watching, failures_named(self.trainer):
            return self.trainer.train(resume_from_checkpoint=self._resume)


def _is_causal(model: Any) -> bool:
    return is_causal(type(base_model(model)).__name__)


def _plain_trainer(
    model: Any,
    dataset: Any,
    eval_dataset: Any,
    *,
    tokenizer: Any,
    max_length: int | None,
    trainer_class: Any,
    arguments: Any,
    callbacks: list[TrainerCallback],
    **others: Any,
) -> Trainer:
    rows, held_out = labelled(dataset, eval_dataset, base_model(model).config)
    length = max_length or _usual_length(model)
    rows, batching = prepare(rows, model, tokenizer, length)
    if held_out is not None:
        held_out, _ = prepare(held_out, model, tokenizer, length)
    return trainer_class(
        model=model,
        # Trainer would look for the names in PeftModel's forward, which has none.
        args=arguments(label_names=label_names(model)),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=batching,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _trl_trainer(
    model: Any,
    dataset: Any,
    eval_dataset: Any,
    *,
    tokenizer: Any,
    max_length: int | None,
    reward: Any,
    objective: Objective,
    trainer_class: Any,
    arguments: Any,
    callbacks: list[TrainerCallback],
) -> Trainer:
    rows = dataset
    if not isinstance(dataset, preparation.TrainingRows):
        rows = preparation.training_rows(dataset, objective, held_out=eval_dataset)
    own: dict[str, Any] = {}
    if "max_length" in {each.name for each in dataclasses.fields(objective.load()[1])}:
        own["max_length"] = max_length or _usual_length(model)
    if objective is SFT:
        own["assistant_only_loss"] = rows.learns_turns
    args = arguments(**own)
    if preparation.is_stream(rows.table) and args.max_steps <= 0:
        allowed = "1 or more: the data is a stream, whose end is not known"
        raise OutOfRangeError(name="max_steps", value=args.max_steps, allowed=allowed)
    path = getattr(args, "chat_template_path", None)
    marked = preparation.templates_checked(rows, tokenizer, vars(args), objective)
    args.chat_template_path = None  # which the tokenizer has now
    rows = preparation.trl_rows(preparation.enough_rows(rows, args), marked)
    if marked.pad_token is None:
        marked.pad_token = marked.eos_token
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows.table,
        eval_dataset=rows.held_out,
        processing_class=marked,
        callbacks=callbacks,
        **({"reward_funcs": reward} if objective.needs_reward else {}),
    )
    if isinstance(trainer.train_dataset, Sized) and len(trainer.train_dataset) == 0:
        raise NothingLearntError(site=rows.origin.name, value=args.max_length)
    # The saved tokenizer has the template that it came with.
    trainer.processing_class = preparation.with_template(tokenizer, path)
    return trainer


def _usual_length(model: Any) -> int:
    """Return the tokens that rows are cut at if nothing else is asked for."""
    return min(MAX_LENGTH, longest_row(base_model(model)) or MAX_LENGTH)


def check_training_options(options: Mapping[str, Any], objective: Objective) -> None:
    """Check the options of the configuration of an objective's trainer.

    Raises:
        MissingPackageError: TRL is needed and not installed.
        TrainingOptionError, TrainingOptionValueError: a name is unknown, or a value cannot be used.
    """
    config_class = _loaded(objective)[1]
    check_options(options, config_class, _defaults(objective, options))


def _loaded(objective: Objective) -> tuple[Any, Any]:
    if objective is not CLASSIFICATION and find_spec("trl") is None:
        raise MissingPackageError(purpose=f"the objective {objective.name}", package="trl")
    return objective.load()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch as the Trainer does, so that new adapters are reproducible."""
    set_seed(seed)


def quiet() -> None:
    """Silence the libraries, except for errors, so that the terminal shows only our progress."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # PEFT and TRL have names that transformers is changing; users cannot change that.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
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


def _machine_defaults() -> dict[str, Any]:
    accelerated = torch.accelerator.is_available()
    return {"use_cpu": not accelerated, "dataloader_pin_memory": accelerated}


def _defaults(objective: Objective, options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {**DEFAULTS, "save_strategy": "steps" if options.get("output_dir") else "no"}
    if objective is not CLASSIFICATION:
        defaults |= TRL_DEFAULTS
    if not objective.keeps_learning_rate:
        defaults["learning_rate"] = LEARNING_RATE
    return {**_machine_defaults(), **defaults, **objective.defaults}
