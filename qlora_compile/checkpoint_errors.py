"""Errors about stored weights: checkpoints that are read directly, and other libraries' tensors."""

from qlora_compile.errors import QloraCompileError


class CheckpointError(QloraCompileError, ValueError):
    template = "{file}: {tensor}: {problem}; {remedy}"


class CheckpointMethodError(QloraCompileError, ValueError):
    template = (
        "{file}: quantization_config has quant_method {value!r}, which is none of those that are "
        "read ({known}); load the model with the package that wrote it, or pass the unquantised "
        "model"
    )


class CheckpointHeadError(QloraCompileError, ValueError):
    template = (
        "{file}: a checkpoint quantised by {value!r} is read as a causal language model, but the "
        "objective needs a classification head; pass the unquantised model and a format"
    )


class StoredWeightError(QloraCompileError, ValueError):
    """Tensors of one weight do not fit together, or are stored in a way that no format holds.

    tensor: the role of the tensor at fault, such as "scales". The caller, which knows the file or
    the module, catches this error and raises one that names it.
    """

    template = "{tensor}: {problem}; {remedy}"


class RepackError(QloraCompileError, ValueError):
    template = "{site}: {tensor}: {problem}; {remedy}"


class QuantisedModelError(QloraCompileError, ValueError):
    template = (
        "{model!r} is quantised already; leave out --format {value} to keep its weights as they "
        "are, or pass the unquantised model"
    )
