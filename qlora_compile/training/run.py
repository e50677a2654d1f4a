"""TrainingRun: one fine-tuning run of the command line, from its checks to the files it writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_compile.errors import OutOfRangeError
from qlora_compile.hf.trainer.sources import check_paths
from qlora_compile.outputs import (
    check_writable,
    held,
    last_checkpoint,
    writable_directory,
    write_whole,
)
from qlora_compile.training.demo import demo_chats
from qlora_compile.training.earlier_run import FIGURES, check_earlier_run, remove_earlier_run
from qlora_compile.training.figures import held_out_figures, peak_memory, training_figures
from qlora_compile.training.held_out import with_held_out
from qlora_compile.training.loss_curve import draw_loss_curve, require_matplotlib
from qlora_compile.training.model_choice import DEMO, ModelChoice, check_format, check_model_path
from qlora_compile.training.reward_functions import reward_functions
from qlora_compile.training.settings import FILE, RunSettings, write_settings
from qlora_compile.training.token_sequences import check_sequence_length

if TYPE_CHECKING:
    from qlora_compile.hf.training import StepObserver

_ANSWER_TOKENS = 64


class TrainingRun:
    """One run. resume: go on from the last checkpoint. overwrite: replace an earlier run."""

    def __init__(
        self, settings: RunSettings, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.settings, self.resume, self.overwrite = settings, resume, overwrite
        self.output = Path(settings.output)
        self.is_demo = settings.data == (DEMO,)
        # Only the first of several processes writes. torchrun sets the variable.
        self._is_first = int(os.environ.get("RANK", "0")) == 0

    def check_quickly(self, *, writes: bool = True) -> None:
        """Check all that needs no library which takes seconds to import, and the format last.

        writes: whether the run will write its folder, which then must be free.

        Raises:
            QloraCompileError: a setting, a path or an earlier run prevents this run.
        """
        self.settings.check_ranges()
        if self.settings.model != DEMO:
            check_model_path(self.settings.model)
        if not self.is_demo:
            check_paths(self._paths)
        if writes:
            require_matplotlib()
            check_writable(self.output)
            self._check_earlier_run()
        check_format(self.settings.format)

    def _check_earlier_run(self) -> None:
        check_earlier_run(self.settings, resume=self.resume, overwrite=self.overwrite)

    @cached_property
    def objective(self) -> Any:
        from qlora_compile.hf.trainer.objectives.registry import objective_named

        return objective_named(self.settings.objective)

    @cached_property
    def reward(self) -> Any:
        return reward_functions(self.settings.reward, self.objective)

    @property
    def _paths(self) -> list[Path]:
        return [Path(each) for each in self.settings.data]

    def rows(self) -> Any:
        """Read and check the rows to train on, with some held out.

        Raises:
            QloraCompileError: a file cannot be read, or a row cannot be trained on.
        """
        from qlora_compile.hf.dataset import rows_of
        from qlora_compile.hf.trainer.preparation import training_rows
        from qlora_compile.hf.training import DEFAULTS

        seed = DEFAULTS["seed"] if self.settings.seed is None else self.settings.seed
        if self.is_demo:
            data, apart = demo_chats(self.settings.held_out, seed)
        else:
            data, apart = rows_of(self._paths, self.settings.columns), None
        rows = training_rows(data, self.objective, held_out=apart or None)
        return with_held_out(rows, self.settings.held_out, seed)

    def checked(self) -> tuple[ModelChoice, Any, Any, Any]:
        """Check the rest, without reading weights; return model choice, configuration, tokenizer
        and rows.

        Raises:
            QloraCompileError: something cannot be used; the class says what.
        """
        from qlora_compile.hf import loading
        from qlora_compile.hf.trainer.class_labels import class_names
        from qlora_compile.hf.trainer.preparation import templates_checked
        from qlora_compile.hf.training import check_training_options, with_max_length

        choice = replace(self.settings.choice, head=self.objective.head)
        config = choice.check()
        choice = choice.with_format(config)
        _ = self.reward  # which is named on the command line
        options = self.settings.trainer_options()
        asked = with_max_length(options, self.settings.max_length, self.objective)
        check_training_options({"output_dir": str(self.output), **asked}, self.objective)
        check_sequence_length(self.settings.max_length, config, self.settings.model)
        rows = self.rows()
        if self.settings.evaluates and rows.held_out is None:
            raise OutOfRangeError(
                name="--held-out",
                value=self.settings.held_out,
                allowed="above 0 with --eval-every, --best-checkpoint or --early-stopping",
            )
        if self.objective.head == "classes":
            choice = replace(choice, labels=tuple(class_names(rows)))
        tokenizer = loading.load_tokenizer(choice.source)
        templates_checked(rows, tokenizer, options, self.objective)
        return choice, config, tokenizer, rows

    def tuning(
        self,
        model: Any,
        tokenizer: Any,
        rows: Any,
        observer: StepObserver | None,
        output: str | None = None,
    ) -> Any:
        """Return the FineTuning of a model on rows, in this run's folder or in `output`."""
        from qlora_compile.hf.training import FineTuning

        settings = self.settings
        checkpoint = last_checkpoint(self.output) if self.resume else None
        return FineTuning(
            model,
            rows,
            objective=settings.objective,
            tokenizer=tokenizer,
            max_length=settings.max_length,
            reward=self.reward,
            observer=observer,
            patience=settings.early_stopping,
            on_nan=settings.on_nan,
            options={
                "output_dir": output or str(self.output),
                "resume_from_checkpoint": checkpoint and str(checkpoint),
                "logging_steps": 1,
                "logging_nan_inf_filter": False,
                "disable_tqdm": True,
                **settings.trainer_options(),
            },
        )

    def execute(
        self, announce: Callable[[str], None], observer: StepObserver
    ) -> tuple[dict[str, Any], Any]:
        """Train and write every file; return the figures of metrics.json and the report.

        Raises:
            QloraCompileError: as `checked`, before anything is trained; or as `FineTuning.train`.
            OutputDirectoryError: another run writes there now.
        """
        announce("checking the settings and reading the data")
        checked = self.checked()
        if not self._is_first:
            return self._execute(announce, observer, *checked)
        with held(writable_directory(self.output)):
            self._check_earlier_run()  # which may have ended since
            return self._execute(announce, observer, *checked)

    def _execute(
        self,
        announce: Callable[[str], None],
        observer: StepObserver,
        choice: ModelChoice,
        config: Any,
        tokenizer: Any,
        rows: Any,
    ) -> tuple[dict[str, Any], Any]:
        from qlora_compile import api
        from qlora_compile.hf import training
        from qlora_compile.hf.saving.whole_weights import is_spread, whole_adapters
        from qlora_compile.hf.trainer.held_out_loss import held_out_losses

        announce(f"loading {choice.model}")
        seed = self.settings.seed
        training.seed_everything(training.DEFAULTS["seed"] if seed is None else seed)
        model = choice.optimized(config)
        tuning = self.tuning(model, tokenizer, rows, observer)
        model = tuning.trainer.model
        tokenizer = tuning.trainer.processing_class  # with the chat template of the run
        if self._is_first:
            self._prepare_output(tuning.trainer)
        if tuning.trainer.eval_dataset is not None:
            announce("held-out loss before training")
        before = held_out_losses(tuning.trainer)
        announce("training; the first step compiles")
        tuning.train()
        report = api.explain(model)  # now, so that it describes the last training step
        after = held_out_losses(tuning.trainer)
        metrics = {
            "settings": self.settings.written(),
            "held_out": held_out_figures(before, after),
            "training": {
                **training_figures(tuning.trainer.state.log_history, observer.seconds),
                "steps": tuning.trainer.state.global_step,
            },
            "skipped_steps": tuning.trainer.skipped_steps,
            "peak_memory": peak_memory(),
            "sites": {
                "fused": sum(bool(site.fused) for site in report.sites),
                "total": len(report.sites),
            },
        }
        # One process alone cannot call a model whose weights are spread over several.
        if self._is_first and self.is_demo and rows.held_out is not None and not is_spread(model):
            announce("answering a held-out question")
            metrics["answers"] = _answers(model, tokenizer, rows.held_out[0]["messages"])
        with whole_adapters(model):
            if self._is_first:
                self._write(choice, model, tokenizer, metrics, report)
        return metrics, report

    def _prepare_output(self, trainer: Any) -> None:
        if not self.resume:
            remove_earlier_run(self.output)
        (self.output / FIGURES).unlink(missing_ok=True)
        write_settings(self.settings, self.output / FILE)
        write_whole(self.output / "trainer.json", trainer.args.to_json_string())

    def _write(
        self, choice: ModelChoice, model: Any, tokenizer: Any, metrics: dict[str, Any], report: Any
    ) -> None:
        model.save_pretrained(str(self.output))
        tokenizer.save_pretrained(str(self.output))
        write_whole(self.output / "report.json", report.to_json())
        held_out = metrics["held_out"]
        losses = metrics["training"]["losses"]
        points = held_out and [
            (0, held_out["before"], held_out["before_standard_error"]),
            (metrics["training"]["steps"], held_out["after"], held_out["after_standard_error"]),
        ]
        name = Path(choice.source).stem if choice.model == DEMO else Path(choice.model).name
        data = "docstrings as chats" if self.is_demo else ", ".join(p.name for p in self._paths)
        draw_loss_curve(
            self.output / "loss.png",
            [entry["step"] for entry in losses],
            [entry["loss"] for entry in losses],
            title=f"{name} on {data}, {choice.format}, rank {choice.rank}",
            held_out=points or (),
        )
        write_whole(self.output / FIGURES, json.dumps(metrics, indent=2, default=str) + "\n")


def _answers(model: Any, tokenizer: Any, chat: list[dict[str, str]]) -> dict[str, str]:
    from qlora_compile.hf.generation import written

    *asked, answer = chat
    options = {"max_new_tokens": _ANSWER_TOKENS}
    with model.disable_adapter():
        without = written(model, tokenizer, asked, **options)
    return {
        "question": asked[-1]["content"],
        "docstring": answer["content"],
        "without the adapter": without,
        "with the adapter": written(model, tokenizer, asked, **options),
    }
