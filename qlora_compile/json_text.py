"""Reads JSON from files that may be damaged or written by others."""

from __future__ import annotations

import json
from typing import Any


def parsed_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or is nested deeper than Python's parser can follow.
    """
    try:
        return json.loads(text)  # noqa: TID251
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
