"""Errors of saving, merging and loading packed models, as in errors.py."""

from qlora_compile.errors import QloraCompileError


class SavedModelTypeError(QloraCompileError, TypeError):
    template = (
        "model is a {value}; a folder is written of a transformers PreTrainedModel, or of a "
        "PeftModel over one; save the state_dict() of any other module"
    )


class RivalWeightsError(QloraCompileError, ValueError):
    template = (
        "{value!r} holds {file}, weights of another kind, which a reader would load in place of "
        "the new ones; choose an empty folder, or remove the file"
    )


class UnfinishedSaveError(QloraCompileError, OSError):
    template = (
        "cannot write {value!r}: {problem}; what was there before is unchanged: free some space, "
        "or choose another folder"
    )


class ShardSizeError(QloraCompileError, ValueError):
    template = 'max_shard_size={value!r} is no size; pass bytes, or a text such as "5GB"'


class MergedWeightsError(QloraCompileError, ValueError):
    template = (
        "{site}: the adapter {adapter!r} is merged into the packed weight, rounded with it; call "
        "unmerge_adapter() before saving"
    )


class SaveOptionError(QloraCompileError, TypeError):
    template = "save_pretrained({option}=…) has no meaning for a packed model; leave {option} out"


class PackedFolderVersionError(QloraCompileError, ValueError):
    template = (
        "the folder is of version {value!r} of the packed format, not {known}; use the release "
        "that wrote it"
    )


class MissingTensorError(QloraCompileError, ValueError):
    template = (
        "{site}: {model} saves this tensor, and the optimised model has {problem}; save the base "
        "model's state_dict() and report the model's class"
    )


class NothingPackedError(QloraCompileError, ValueError):
    template = (
        "{model} has no packed weights; save it by its own save_pretrained, or pack it first by "
        "qlora_compile.optimize(model, quantize=...)"
    )


class FolderFormatError(QloraCompileError, ValueError):
    template = (
        "stored_as={value!r}: {reason}; pass stored_as='qlora_compile', which holds every format"
    )


class UnmergeableError(QloraCompileError, ValueError):
    template = "{site} cannot be merged: {reason}; serve the adapter beside its base instead"


class SpreadModelError(QloraCompileError, ValueError):
    template = (
        "tokenizer: the weights of {model} are spread over processes, and one alone, which merges, "
        "cannot call the model to measure; pass no tokenizer, and save it by its save_pretrained"
    )


class UnknownAdapterError(QloraCompileError, ValueError):
    template = "the model has no adapter {value!r}; it has {known}"


class DtypeError(QloraCompileError, ValueError):
    template = "dtype={value!r} cannot be written; choose one of {known}"


class BaseFolderError(QloraCompileError, ValueError):
    template = "{value!r} is the folder that the base model came from; choose another output"


class SkeletonError(QloraCompileError, ValueError):
    template = (
        "checkpoint= cannot fill this {model}: {problem}; make the model under "
        "torch.device('meta'), in the class that its configuration names"
    )
