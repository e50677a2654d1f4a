"""Files beside the weights of a checkpoint: modelopt's settings, and the generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.hf.checkpoints.folder import AGAIN
from qlora_compile.json_text import parsed_json

_MODELOPT_FILE = "hf_quant_config.json"


def add_settings_beside(source: str, config: Any) -> None:
    """Give `config` the `quantization_config` that modelopt's older exports have in another file.

    source: a folder or a Hub name. Raises CheckpointError if that file cannot be read.
    """
    file = cached_file(
        source,
        _MODELOPT_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return
    try:
        settings = parsed_json(Path(file).read_text(encoding="utf-8"))["quantization"]
        config.quantization_config = {**settings, "quant_method": "modelopt"}
    except (ValueError, KeyError, TypeError) as error:
        problem = f"the file cannot be read ({error!r})"
        raise CheckpointError(
            file=file, tensor="quantization", problem=problem, remedy=AGAIN
        ) from error


def generation_config(folder: Path) -> GenerationConfig:
    """Read the generation settings in `folder`. Raises CheckpointError."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        file, problem = folder / GENERATION_CONFIG_NAME, f"the file cannot be read ({error})"
        raise CheckpointError(
            file=file, tensor="all values", problem=problem, remedy=AGAIN
        ) from error
