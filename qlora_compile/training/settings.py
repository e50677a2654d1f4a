"""RunSettings: all settings of one training run of the command line, and the file for them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from qlora_compile.errors import OutOfRangeError
from qlora_compile.outputs import write_whole
from qlora_compile.training.errors import MissingSettingError, SettingsFileError
from qlora_compile.training.model_choice import ModelChoice

FILE = "run.yaml"
AUTOMATIC = "auto"
ON_NAN = ("stop", "skip")
DTYPES = (AUTOMATIC, "bfloat16", "float16", "float32")

TRAINER_OPTIONS = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "learning_rate": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "weight_decay": "weight_decay",
    "optimizer": "optim",
    "packing": "packing",
    "checkpoint_every": "save_steps",
    "seed": "seed",
    "report_to": "report_to",
}
"""Settings that are options of the trainer's configuration, and their names there."""


@dataclass(frozen=True)
class RunSettings:
    """The settings of `qlora-compile train`, named like its options.

    None leaves a setting at its default, the same as in Python: that of `hf.training.DEFAULTS`, or
    the trainer's own. options: those given by `--set`, by their names in the trainer's
    configuration. data: paths or a Hub name, or "demo".
    """

    model: str
    data: tuple[str, ...]
    output: str = "qlora-output"
    objective: str = "sft"
    columns: dict[str, str] = field(default_factory=dict)
    reward: str | None = None
    format: str | None = None
    block_size: int | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    dora: bool = False
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    dtype: str = AUTOMATIC
    tune: str = "auto"
    logits_free_loss: bool = False
    max_length: int | None = None
    packing: bool | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    gradient_checkpointing: bool | None = None
    learning_rate: float | None = None
    scheduler: str | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    optimizer: str | None = None
    held_out: float = 0.1
    eval_every: int | None = None
    best_checkpoint: bool = False
    early_stopping: int | None = None
    checkpoint_every: int | None = None
    seed: int | None = None
    report_to: str | None = None
    on_nan: str = "stop"
    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def choice(self) -> ModelChoice:
        return ModelChoice(
            model=self.model,
            format=self.format,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            tune=self.tune,
            block_size=self.block_size,
            targets=self.targets,
            lora_options={
                "use_dora": self.dora,
                "use_rslora": self.rslora,
                "rank_pattern": self.rank_pattern,
            },
            dtype=None if self.dtype == AUTOMATIC else self.dtype,
            logits_free_loss=self.logits_free_loss,
        )

    def check_ranges(self) -> None:
        """Raise OutOfRangeError for a setting outside its range."""
        least = {
            **dict.fromkeys(("steps", "batch_size", "accumulation", "eval_every"), 1),
            **dict.fromkeys(("early_stopping", "checkpoint_every", "processes"), 1),
            **dict.fromkeys(("warmup", "weight_decay"), 0),
            "max_length": 2,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise OutOfRangeError(
                    name=_option(name), value=value, allowed=f"{smallest} or more"
                )
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise OutOfRangeError(name=_option(name), value=value, allowed="a number above 0")
        for name, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                option = f"--rank-pattern {name}"
                raise OutOfRangeError(name=option, value=rank, allowed="an integer of 1 or more")
        if not 0 <= self.held_out < 1:
            allowed = "a fraction from 0 to below 1"
            raise OutOfRangeError(name="--held-out", value=self.held_out, allowed=allowed)
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise OutOfRangeError(name="--seed", value=self.seed, allowed="0 to 2**32 - 1")
        if self.on_nan not in ON_NAN:
            raise OutOfRangeError(name="--on-nan", value=self.on_nan, allowed=" or ".join(ON_NAN))
        if self.dtype not in DTYPES:
            raise OutOfRangeError(name="--dtype", value=self.dtype, allowed=" or ".join(DTYPES))

    def trainer_options(self) -> dict[str, Any]:
        """Return the settings given for the trainer's configuration, by its names for them."""
        mapped = {own: getattr(self, name) for name, own in TRAINER_OPTIONS.items()}
        chosen = {own: value for own, value in mapped.items() if value is not None}
        if self.batch_size is not None:
            chosen["per_device_eval_batch_size"] = self.batch_size
        strategy = "no" if not self.evaluates else "steps" if self.eval_every else "epoch"
        chosen["eval_strategy"] = strategy
        if self.eval_every:
            chosen["eval_steps"] = self.eval_every
        if self.keeps_best:
            chosen |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
            chosen["save_strategy"] = strategy
            if self.eval_every:
                chosen["save_steps"] = self.eval_every
        # YAML 1.1 reads "no", the name of a strategy, as false.
        given = {
            name: "no" if value is False and name.endswith("_strategy") else value
            for name, value in self.options.items()
        }
        return {**chosen, **given}

    @property
    def evaluates(self) -> bool:
        return self.eval_every is not None or self.keeps_best

    @property
    def keeps_best(self) -> bool:
        return self.best_checkpoint or self.early_stopping is not None

    def written(self) -> dict[str, Any]:
        """Return the settings that are not None, as a run's file has them."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def write_settings(settings: RunSettings, file: Path) -> None:
    """Write settings as `settings_from` reads them; the file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(file, yaml.safe_dump(settings.written(), sort_keys=False, allow_unicode=True))


def settings_from(given: Mapping[str, Any], file: Path | None) -> RunSettings:
    """Return the settings of a file, overridden by those in `given` that are not None.

    Raises:
        SettingsFileError: the file cannot be read, or holds anything but settings.
        MissingSettingError: neither has the model or the data.
    """
    values = {} if file is None else _read(file)
    given = {name: value for name, value in given.items() if value is not None}
    given["options"] = {**values.get("options", {}), **given.get("options", {})}
    values |= given
    for name in ("model", "data"):
        if not values.get(name):
            raise MissingSettingError(name=_option(name))
    return RunSettings(**values)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(file: Path) -> dict[str, Any]:
    def refuse(problem: str) -> SettingsFileError:
        return SettingsFileError(value=str(file), problem=problem)

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(getattr(error, "strerror", None) or "it is not UTF-8") from error
    except yaml.YAMLError as error:
        raise refuse(" ".join(str(error).split())) from error
    if not isinstance(values, dict):
        raise refuse("it holds no settings")
    types = {each.name: str(each.type) for each in fields(RunSettings)}
    for name, value in values.items():
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=2, cutoff=0.5)
            raise refuse(f"{name!r} is not a setting; the nearest is {' or '.join(near) or 'none'}")
        try:
            values[name] = _typed(value, types[name])
        except (TypeError, ValueError) as error:
            raise refuse(f"{name} is {value!r} and no {types[name]}") from error
    return values


def _typed(value: Any, wanted: str) -> Any:
    """Return a value of YAML in the type of its setting."""
    kind = wanted.removesuffix(" | None")
    if value is None:
        if kind != wanted:
            return None
        raise TypeError(value)
    if kind.startswith("dict"):
        return {name: plain(each) for name, each in dict(value).items()}
    if kind.startswith("tuple"):
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    made: Any = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if isinstance(value, bool) != (kind == "bool") or (kind == "int" and int(value) != value):
        raise TypeError(value)
    return made(value)


def plain(value: Any) -> Any:
    """Return a value of YAML; 1e-4, which YAML 1.1 reads as text, as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
