"""TrainedRun: an adapter that was trained, and the base model it was trained on, to read again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_compile.saving_errors import AdapterFolderError
from qlora_compile.training.model_choice import ModelChoice, quiet_choice

SETTINGS_FILE = "settings.json"
_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class TrainedRun:
    """An adapter's folder, and the base with the format that it was trained in."""

    adapter: Path
    choice: ModelChoice

    def check(self) -> None:
        """Raise what `ModelChoice.check` raises; read no weights."""
        self.choice.check()

    def model(self) -> Any:
        """Return the PeftModel, packed but not compiled."""
        from qlora_compile.hf.adapters import with_adapter

        return with_adapter(self.choice.packed(), self.adapter)

    def tokenizer(self) -> Any:
        """Return the adapter's tokenizer, or else the base model's.

        Raises:
            TokenizerMissingError: neither folder has one.
        """
        from qlora_compile.hf import loading

        own = loading.has_tokenizer(self.adapter)
        return loading.load_tokenizer(self.adapter if own else self.choice.source)


def trained_run(adapter: Path, model: str | None, format: str | None) -> TrainedRun:
    """Return the run in a folder; `model` and `format` None for those noted there.

    Raises:
        AdapterFolderError: there is no adapter, or nothing says what it was trained on.
    """
    if not (adapter / _ADAPTER_FILE).is_file():
        problem = f"there is no {_ADAPTER_FILE}"
        raise AdapterFolderError(value=str(adapter), problem=problem, remedy="check the path")
    file = adapter / SETTINGS_FILE
    noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in (("model", model), ("format", format)):
        if value is None and name not in noted:
            option = "--model" if name == "model" else "--base-format"
            raise AdapterFolderError(
                value=str(adapter),
                problem=f"{SETTINGS_FILE} of qlora-compile train is missing",
                remedy=f"pass {option}",
            )
    chosen = model or noted["model"], format or noted["format"]
    return TrainedRun(adapter, quiet_choice(*chosen, rank=1, alpha=None, dropout=0.0))
