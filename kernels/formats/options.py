"""Options: what one may choose of a format when a weight is packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_compile.errors import DoubleQuantizeError
from qlora_compile.kernels.formats.errors import FormatOptionError, FormatOptionValueError

DOUBLE = "double_quantize"


@dataclass(frozen=True)
class Option:
    """One choice: a keyword `name`, the `values` it may have, and the `default` among them.

    stored: whether the option decides how the weight is stored, and so is part of a Layout; if not,
    it decides how codes are found.
    """

    name: str
    values: tuple[Any, ...]
    default: Any
    stored: bool = True

    @property
    def allowed(self) -> str | None:
        """The values that are allowed, in words; None if `values` lists them all."""
        return None

    def check(self, format: str, value: object) -> Any:
        """Return `value`, if it is one of `values`. Raises FormatOptionValueError."""
        # 64.0 and True are equal to whole numbers, but are not allowed.
        if any(type(value) is type(each) and value == each for each in self.values):
            return value
        known = " or ".join(repr(each) for each in self.values)
        raise FormatOptionValueError(format=format, option=self.name, value=value, known=known)

    def read(self, text: str) -> Any:
        """Return the value that `text` stands for, unchecked; else `text` itself."""
        if text.isdecimal():
            return int(text)
        return {str(each).lower(): each for each in self.values}.get(text.lower(), text)


def checked(format: str, options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every one of `options`: the `given` one, else the default.

    Raises FormatOptionError for a name that is none of the options, DoubleQuantizeError if that
    name is `double_quantize` and its value is not false, FormatOptionValueError for a bad value.
    """
    known = {option.name: option for option in options}
    for name, value in given.items():
        if name in known or (name == DOUBLE and not value):
            continue
        if name == DOUBLE:
            raise DoubleQuantizeError(format=format)
        listed = ", ".join(known) or "none"
        raise FormatOptionError(format=format, option=name, value=value, known=listed)
    return {
        name: option.check(format, given.get(name, option.default))
        for name, option in known.items()
    }
