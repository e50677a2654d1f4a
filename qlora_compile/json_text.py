"""Reading JSON that anybody may have written."""

from __future__ import annotations

import json
from typing import Any


def parsed_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is no JSON, or is nested deeper than Python's parser goes.
    """
    try:
        return json.loads(text)  # noqa: TID251
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
