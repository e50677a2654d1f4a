"""What can be wrong with a format's options, and with values that it stores."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class AbsmaxOverflowError(QloraCompileError, ValueError):
    template = (
        "{site}: the mean of the block maxima (largest {largest}) exceeds float32, so they cannot "
        "be quantised a second time; pass double_quantize=False or repair the checkpoint"
    )


class FormatOptionError(QloraCompileError, TypeError):
    template = (
        "{option}={value!r}: neither optimize nor the format {format!r} has such an option; the "
        "format's are: {known}"
    )


class FormatOptionValueError(QloraCompileError, ValueError):
    template = "{option}={value!r} cannot be had with format {format!r}; use {known}"


class FormatTextError(QloraCompileError, ValueError):
    template = "{value!r}: {pair!r} is no option=value; write a format as int4:group_size=128"


class OptionWithoutFormatError(QloraCompileError, TypeError):
    template = (
        "{option}={value!r}: optimize itself has no such option, and quantize= names no format "
        "that might; correct the name or name a format"
    )


class ScaleOverflowError(QloraCompileError, ValueError):
    template = "{site}: a scale of {largest} exceeds {dtype}; pass scales='bfloat16' or 'float32'"
