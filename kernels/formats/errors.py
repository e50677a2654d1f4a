"""Errors about a format's options, and about values that it cannot store."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class AbsmaxOverflowError(QloraCompileError, ValueError):
    template = (
        "{site}: the mean of the block maxima (largest {largest}) exceeds float32, so they cannot "
        "be quantised a second time; pass double_quantize=False or repair the checkpoint"
    )


class FormatOptionError(QloraCompileError, TypeError):
    template = (
        "{option}={value!r}: neither optimize nor the format {format!r} has such an option; use "
        "one of the format's: {known}"
    )


class FormatOptionValueError(QloraCompileError, ValueError):
    template = "{option}={value!r} is not possible with format {format!r}; use {known}"


class FormatTextError(QloraCompileError, ValueError):
    template = "{value!r}: {pair!r} is not option=value; write a format like int4:group_size=128"


class OptionWithoutFormatError(QloraCompileError, TypeError):
    template = (
        "{option}={value!r}: optimize has no such option, and without quantize= there is no format "
        "whose option it could be; correct the name, or pass quantize="
    )


class ScaleOverflowError(QloraCompileError, ValueError):
    template = "{site}: a scale of {largest} exceeds {dtype}; pass scales='bfloat16' or 'float32'"
