"""Every error this package raises: one class per mistake, one message template per class.

A message names the site, the offending value and the remedy. All classes derive from
`QloraCompileError`; those that stem from an argument's value are `ValueError`s too.
"""


class QloraCompileError(Exception):
    """Base class. Subclasses set `template`; instances are built from its fields."""

    template = "{message}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))

    def __reduce__(self):
        return (_rebuild, (type(self), self.fields))


def _rebuild(cls: type[QloraCompileError], fields: dict[str, object]) -> QloraCompileError:
    return cls(**fields)


class UnknownFormatError(QloraCompileError, ValueError):
    template = "unknown quantisation format {value!r}; choose one of {known}, or None to keep the weights as they are"


class BlockSizeError(QloraCompileError, ValueError):
    template = "block_size={value!r} {problem}; use a power of two from {smallest} to {largest}{extra}"


class DoubleQuantizeError(QloraCompileError, ValueError):
    template = "format {format!r} has no double quantisation; pass double_quantize=False"


class WeightValueError(QloraCompileError, ValueError):
    template = (
        "{site}: the weight holds {count} NaN or infinite values and cannot be quantised; "
        "repair or reload the checkpoint"
    )


class WeightShapeError(QloraCompileError, ValueError):
    template = "{site}: expected a floating-point weight of shape [N, K] with N, K >= 1, got {value}"


class PackedWeightError(QloraCompileError, ValueError):
    template = "packed weight of format {format!r} and shape {shape}: {problem}"
