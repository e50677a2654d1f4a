"""Reads NAME=VALUE from options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from qlora_compile.cli.errors import NamedValueError
from qlora_compile.training.settings import plain


def named_values(option: str, text: str | Sequence[str] | None) -> dict[str, Any] | None:
    """Return names with their values, which are read as YAML; None for None.

    text: "NAME=VALUE,NAME=VALUE", or a list of single "NAME=VALUE", whose values may have commas.

    Raises:
        NamedValueError: a part has no name or no value.
    """
    if text is None:
        return None
    values = {}
    for part in text.split(",") if isinstance(text, str) else text:
        name, separator, value = part.partition("=")
        if not name.strip() or not separator:
            raise NamedValueError(option=option, value=part)
        try:
            values[name.strip()] = plain(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise NamedValueError(option=option, value=part) from error
    return values
