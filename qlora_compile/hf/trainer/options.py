"""Checks the options of a trainer's configuration, before a model is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from transformers.integrations import get_reporting_integration_callbacks

from qlora_compile.errors import TrainingOptionError
from qlora_compile.hf.trainer.objectives.base import Objective
from qlora_compile.hf.trainer.objectives.classification import CLASSIFICATION
from qlora_compile.training_errors import TrainingOptionValueError

_NUMBERS = {"int", "float", "bool", "int | None", "float | None", "bool | None"}


def check_options(
    options: Mapping[str, Any], config_class: Any, defaults: Mapping[str, Any]
) -> None:
    """Check names and values of options.

    defaults: values that this machine needs, for options that are not given.

    Raises:
        TrainingOptionError: `config_class` has no such option; the message names the nearest.
        TrainingOptionValueError: a value, or several together, cannot be used.
    """
    types = {each.name: each.type for each in dataclasses.fields(config_class) if each.init}
    for name, value in options.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=3, cutoff=0.5)
            closest = ", ".join(near) or "none that is similar; see its documentation"
            raise TrainingOptionError(value=name, config=config_class.__name__, closest=closest)
        kind = types[name] if isinstance(types[name], str) else _written(types[name])
        if isinstance(value, str) and kind in _NUMBERS:
            raise TrainingOptionValueError(value=f"{name}={value!r}", problem=f"it is no {kind}")
    problem = _problem(options, config_class, defaults)
    if problem is None:
        return
    for name, value in options.items():
        if own := _problem({name: value}, config_class, defaults):
            raise TrainingOptionValueError(value=f"{name}={value!r}", problem=own)
    together = ", ".join(f"{name}={value!r}" for name, value in options.items())
    raise TrainingOptionValueError(value=together, problem=problem)


def with_max_length(
    options: Mapping[str, Any], max_length: int | None, objective: Objective
) -> Mapping[str, Any]:
    """Return the options with a given `max_length` among them, which not every trainer has."""
    if max_length is None or objective is CLASSIFICATION:
        return options
    return {"max_length": max_length, **options}


def _written(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _problem(
    options: Mapping[str, Any], config_class: Any, defaults: Mapping[str, Any]
) -> str | None:
    """Return why no trainer can be configured by `options`, None if one can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer's own configuration gives them again
            config = config_class(**{"output_dir": "unused", **defaults, **options})
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()  # as a trainer makes it; it fails where its package is not installed
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        return " ".join(str(error).split())
    return None
