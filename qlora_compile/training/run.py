"""TrainingRun: one fine-tuning run of the command line, from its checks to the files it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_compile.errors import (
    OutOfRangeError,
    OutputDirectoryError,
    ResumeError,
)
from qlora_compile.outputs import check_writable, last_checkpoint, writable_directory
from qlora_compile.training.demo import docstring_documents
from qlora_compile.training.documents import Document, read_documents, split
from qlora_compile.training.figures import held_out_figures, peak_memory, training_figures
from qlora_compile.training.loss_curve import draw_loss_curve, require_matplotlib
from qlora_compile.training.model_choice import DEMO, ModelChoice, check_format
from qlora_compile.training.token_sequences import check_sequence_length, token_sequences
from qlora_compile.training.trained_run import SETTINGS_FILE

if TYPE_CHECKING:
    from qlora_compile.hf.training import StepObserver

_HELD_OUT_SEQUENCES = 64  # enough for a small standard error, few enough to evaluate in a moment
# Settings that may differ when a run is resumed: where it writes, how far it goes, how often it
# saves.
_MAY_CHANGE = frozenset({"output", "resume", "overwrite", "steps", "checkpoint_every"})


@dataclass(frozen=True)
class TrainingRun:
    """The settings of one run, named as the options of `qlora-compile train`.

    held_out: the fraction of the documents that are held out. checkpoint_every: steps.
    """

    choice: ModelChoice
    data: str
    output: Path
    steps: int
    sequence_length: int
    batch_size: int
    learning_rate: float
    seed: int
    held_out: float
    checkpoint_every: int
    resume: bool = False
    overwrite: bool = False

    def settings(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {**values.pop("choice"), **values, "output": str(self.output)}

    def check(self) -> Any:
        """Check all settings and the text file, without reading weights; return the configuration.

        Raises:
            QloraCompileError: a value cannot be used; the class says which.
        """
        check_format(self.choice.format)
        for name, value, fine, allowed in (
            ("--steps", self.steps, self.steps >= 1, "1 or more"),
            ("--sequence-length", self.sequence_length, self.sequence_length >= 2, "2 or more"),
            ("--batch-size", self.batch_size, self.batch_size >= 1, "1 or more"),
            ("--seed", self.seed, 0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            ("--held-out", self.held_out, 0 <= self.held_out < 1, "a fraction from 0 to below 1"),
            ("--checkpoint-every", self.checkpoint_every, self.checkpoint_every >= 1, "1 or more"),
            (
                "--learning-rate",
                self.learning_rate,
                self.learning_rate > 0 and math.isfinite(self.learning_rate),
                "a number above 0",
            ),
        ):
            if not fine:
                raise OutOfRangeError(name=name, value=value, allowed=allowed)
        require_matplotlib()
        check_writable(self.output)
        self._check_earlier_run()
        if self.data != DEMO:
            read_documents(Path(self.data))
        config = self.choice.check()
        check_sequence_length(self.sequence_length, config, self.choice.model)
        return config

    def _check_earlier_run(self) -> None:
        checkpoint = last_checkpoint(self.output)
        where = str(self.output)
        if not self.resume:
            if checkpoint and not self.overwrite:
                raise OutputDirectoryError(
                    value=where,
                    problem="it holds the checkpoints of an earlier run",
                    remedy="--resume continues that run, --overwrite replaces it",
                )
            return
        if self.overwrite:
            raise ResumeError(
                value=where,
                problem="--overwrite would remove what --resume continues",
                remedy="pass one of the two",
            )
        if checkpoint is None:
            raise ResumeError(
                value=where, problem="it holds no checkpoint", remedy="train without --resume first"
            )
        if (done := int(checkpoint.name.rpartition("-")[2])) >= self.steps:
            raise ResumeError(
                value=where,
                problem=f"step {done} of {self.steps} is done already",
                remedy=f"pass --steps above {done}",
            )
        file = self.output / SETTINGS_FILE
        earlier = json.loads(file.read_text()) if file.is_file() else {}
        for name, value in self.settings().items():
            if name not in _MAY_CHANGE and name in earlier and earlier[name] != value:
                raise ResumeError(
                    value=where,
                    problem=f"the run had {name}={earlier[name]!r}, not {value!r}",
                    remedy="pass what the run had, or choose another directory",
                )

    def documents(self) -> list[Document]:
        """Return the text to train on and to hold out."""
        return docstring_documents() if self.data == DEMO else read_documents(Path(self.data))

    def sequences(self, tokenizer: Any, config: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Return token sequences to train on and held-out ones, from different documents.

        Raises:
            TooLittleTextError: the text does not fill one sequence.
            TokenizerVocabularyError: the tokenizer belongs to another model.
        """
        documents = self.documents()
        training_documents, held_out_documents = split(documents, self.held_out, self.seed)
        training, held_out = (
            token_sequences(
                part, tokenizer, config, self.sequence_length, data=self.data, purpose=purpose
            )
            for purpose, part in (
                ("training", training_documents),
                ("held-out", held_out_documents),
            )
        )
        if len(held_out) > _HELD_OUT_SEQUENCES:
            held_out = random.Random(self.seed).sample(held_out, _HELD_OUT_SEQUENCES)
        return training, held_out

    def execute(
        self, announce: Callable[[str], None], observer: StepObserver
    ) -> tuple[dict[str, Any], Any]:
        """Train and write every file; return the figures of metrics.json and the report.

        Raises:
            QloraCompileError: as `check` and `sequences`, before anything is trained.
        """
        from qlora_compile import api
        from qlora_compile.hf import loading, training

        announce("checking")
        config = self.check()
        announce("reading text")
        tokenizer = loading.load_tokenizer(self.choice.source)
        train_sequences, held_out = self.sequences(tokenizer, config)
        writable_directory(self.output)
        announce(f"loading {self.choice.model}")
        training.seed_everything(self.seed)
        model = self.choice.optimized(config)
        self._prepare_output()
        announce(f"held-out loss before training ({len(held_out)} sequences)")
        before = training.sequence_losses(model, held_out, self.batch_size)
        announce("training; the first step compiles")
        checkpoint = last_checkpoint(self.output) if self.resume else None
        _, history = training.fine_tune(
            model,
            [{"input_ids": sequence} for sequence in train_sequences],
            tokenizer=tokenizer,
            observer=observer,
            options={
                "output_dir": str(self.output),
                "resume_from_checkpoint": checkpoint and str(checkpoint),
                "max_steps": self.steps,
                "per_device_train_batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0.1,
                "logging_steps": 1,
                "logging_nan_inf_filter": False,
                "save_steps": self.checkpoint_every,
                "save_total_limit": 2,
                "seed": self.seed,
                "disable_tqdm": True,
            },
        )
        report = api.explain(model)  # now, so that it describes the last training step
        announce(f"held-out loss after training ({len(held_out)} sequences)")
        after = training.sequence_losses(model, held_out, self.batch_size)
        metrics = {
            "settings": self.settings(),
            "held_out": held_out_figures(before, after),
            "training": training_figures(
                history, observer.seconds, self.batch_size * self.sequence_length
            ),
            "peak_memory": peak_memory(),
            "sites": {
                "fused": sum(bool(site.fused) for site in report.sites),
                "total": len(report.sites),
            },
        }
        self._write(model, tokenizer, metrics, report)
        return metrics, report

    def _prepare_output(self) -> None:
        if not self.resume:
            for checkpoint in self.output.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        _write_json(self.output / SETTINGS_FILE, self.settings())

    def _write(self, model: Any, tokenizer: Any, metrics: dict[str, Any], report: Any) -> None:
        model.save_pretrained(str(self.output))
        tokenizer.save_pretrained(str(self.output))
        _write_json(self.output / "metrics.json", metrics)
        (self.output / "report.json").write_text(report.to_json(), encoding="utf-8")
        held_out = metrics["held_out"]
        losses = metrics["training"]["losses"]
        points = held_out and [
            (0, held_out["before"], held_out["before_standard_error"]),
            (self.steps, held_out["after"], held_out["after_standard_error"]),
        ]
        draw_loss_curve(
            self.output / "loss.png",
            [entry["step"] for entry in losses],
            [entry["loss"] for entry in losses],
            title=self._title(),
            held_out=points or (),
        )

    def _title(self) -> str:
        data = "standard-library docstrings" if self.data == DEMO else Path(self.data).name
        model = Path(self.choice.source).stem if self.choice.model == DEMO else self.choice.model
        return f"{Path(model).name} on {data}, {self.choice.format}, rank {self.choice.rank}"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
