"""A trained adapter: finds its model, and loads both."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_compile.hf.trainer.objectives.registry import OBJECTIVES
from qlora_compile.json_text import parsed_json
from qlora_compile.outputs import checkpoints
from qlora_compile.training.errors import AdapterFolderError, MergedFromError
from qlora_compile.training.settings import FILE, RunSettings, settings_from

_OTHER_HEADS = {each.name for each in OBJECTIVES if each.head != "causal"}
"""Objectives whose models do not predict tokens."""


def adapter_settings(folder: Path, model: str | None, format: str | None) -> RunSettings:
    """Return the settings of the run that wrote the adapter, or the checkpoint, in `folder`.

    Adapters from elsewhere have no settings; their configuration names the model. model, format:
    replace those found.

    Raises:
        AdapterFolderError: the folder holds no adapter of a language model, or does not say of
            which model or over which format.
        SettingsFileError: its settings cannot be read.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        problem, remedy = "it has no adapter_config.json", "pass the --output of a run"
        raise AdapterFolderError(value=str(folder), problem=problem, remedy=remedy)
    run = folder.resolve()
    if run in [each for _, each in checkpoints(run.parent)]:
        run = run.parent
    if (run / FILE).is_file():
        found = settings_from({}, run / FILE)
        if found.objective in _OTHER_HEADS:
            raise AdapterFolderError(
                value=str(folder),
                problem=f"the objective {found.objective} trained it with a head of its own",
                remedy="load it by peft.AutoPeftModelForSequenceClassification",
            )
    else:
        base = model or _base_model(config)
        if not base:
            problem, remedy = "its configuration names no model", "pass --model"
            raise AdapterFolderError(value=str(folder), problem=problem, remedy=remedy)
        if format is None:
            raise AdapterFolderError(
                value=str(folder),
                problem=f"it has no {FILE}, which would say how the base was stored",
                remedy="pass the format that it was trained over, such as nf4, int8 or none, by "
                "--format, or --base-format to merge",
            )
        found = RunSettings(model=base, data=())
    return replace(found, model=model or found.model, format=format or found.format)


def merged_from(folder: Path) -> tuple[Path, str | None, str | None]:
    """Return the folder of the adapter that was merged into the model in `folder`, and the model
    and the format that were given in place of the adapter's own.

    Raises:
        MergedFromError: the folder does not say so, or the adapter is not there.
    """
    from qlora_compile.hf.merging.write import ORIGIN

    try:
        found = parsed_json((folder / ORIGIN).read_text(encoding="utf-8"))
        adapter = folder.resolve() / found["adapter"]
    except FileNotFoundError as error:
        raise MergedFromError(value=str(folder), problem=f"it has no {ORIGIN}") from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        problem = f"{ORIGIN} cannot be read ({error})"
        raise MergedFromError(value=str(folder), problem=problem) from error
    if not adapter.is_dir():
        problem = f"the adapter is no longer in {os.path.normpath(adapter)!r}"
        raise MergedFromError(value=str(folder), problem=problem)
    return adapter.resolve(), found.get("model"), found.get("format")


def _base_model(config: Path) -> str | None:
    """Return the name of the model that an adapter's configuration names, None if it names none."""
    try:
        found = parsed_json(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem, remedy = f"{config.name} cannot be read ({error})", "write it again"
        raise AdapterFolderError(
            value=str(config.parent), problem=problem, remedy=remedy
        ) from error
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) else None


def packed_model(folder: Path, tokenizer: str | None) -> tuple[Any, Any, Path | None]:
    """Return the optimised model of a packed folder, a tokenizer, and the folder of the adapter
    that was saved with the model, if one was.

    tokenizer: where it is, None for the folder itself.

    Raises:
        What `load_model` and `load_tokenizer` raise.
    """
    from qlora_compile import api
    from qlora_compile.hf import loading
    from qlora_compile.hf.saving.save import ADAPTERS

    model = loading.load_model(folder)
    adapter = folder / ADAPTERS
    found = adapter if (adapter / "adapter_config.json").is_file() else None
    model = api.optimize(model if found is None else loading.with_adapter(model, found))
    model = model.to(loading.compute_device()).eval()
    return model, loading.load_tokenizer(tokenizer or folder), found


def adapted_model(folder: Path, settings: RunSettings) -> tuple[Any, Any]:
    """Return the optimised model with the adapter in `folder`, and its tokenizer.

    Raises:
        What `ModelChoice.check` raises.
    """
    from qlora_compile.hf import loading

    choice = settings.choice
    config = choice.check()
    model = choice.packed(loading.with_adapter(choice.loaded(config), folder), config)
    model = model.to(loading.compute_device()).eval()
    own = loading.has_tokenizer(folder)
    return model, loading.load_tokenizer(folder if own else choice.source)
