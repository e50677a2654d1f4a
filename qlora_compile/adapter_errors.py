"""Errors about adapters and other libraries' weights in a model that is to be packed."""

from qlora_compile.errors import QloraCompileError


class AdapterMethodError(QloraCompileError, ValueError):
    template = (
        "{site}: the weight is packed, and PEFT's method {method!r} does not work over packed "
        "weights; use one of {known}, or optimise without quantize"
    )


class NothingToPackError(QloraCompileError, ValueError):
    template = (
        "quantize={value!r}: {model} has no Linear to pack; {site}: {reason}; pass "
        "quantize=None to keep the weights as they are, or load the model unquantised"
    )
