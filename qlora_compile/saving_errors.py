"""Errors of saving, merging and loading packed models; their base class is in errors.py."""

from qlora_compile.errors import QloraCompileError


class SavedModelTypeError(QloraCompileError, TypeError):
    template = (
        "model is a {value}, but only a transformers PreTrainedModel, or a PeftModel over one, is "
        "written as a folder; save the state_dict() of any other module"
    )


class RivalWeightsError(QloraCompileError, ValueError):
    template = (
        "{value!r} holds {file}, which a reader would load in place of the new weights; choose an "
        "empty folder, or remove the file"
    )


class UnfinishedSaveError(QloraCompileError, OSError):
    template = "cannot write {value!r}: {problem}; what was there before is unchanged; {remedy}"


class ShardSizeError(QloraCompileError, ValueError):
    template = 'max_shard_size={value!r} is not a size; pass bytes, or a text such as "5GB"'


class MergedWeightsError(QloraCompileError, ValueError):
    template = (
        "{site}: the adapter {adapter!r} is merged into the packed weight; call unmerge_adapter() "
        "before saving"
    )


class ForeignLayerError(QloraCompileError, ValueError):
    template = (
        "{site} is a {kind}, which {library} has quantised and which could not be packed here, and "
        "no folder holds both; explain(model) says why, or load the unquantised model"
    )


class SaveOptionError(QloraCompileError, TypeError):
    template = (
        "{option}=… has no meaning when a packed model is saved or pushed; leave {option} out"
    )


class PackedFolderVersionError(QloraCompileError, ValueError):
    template = (
        "{folder} has version {value!r} of the packed format, and this release reads version "
        "{known}; use the release of qlora_compile that wrote the folder"
    )


class OldTransformersError(QloraCompileError, RuntimeError):
    template = (
        "transformers {value} cannot open a packed folder by from_pretrained, which needs 5.18 or "
        "newer; call qlora_compile.load(folder)"
    )


class DiskOffloadError(QloraCompileError, ValueError):
    template = (
        "device_map puts {site} on disk, and packed weights have to be in memory; leave it on "
        "'cpu' or a device, or raise max_memory"
    )


class MissingTensorError(QloraCompileError, ValueError):
    template = (
        "{site}: {model} saves this tensor, but the optimised model has {problem}; save the base "
        "model's state_dict() and report the model's class"
    )


class NothingPackedError(QloraCompileError, ValueError):
    template = (
        "{model} has no packed weights; save it by its own save_pretrained, or pack them first by "
        "qlora_compile.optimize(model, quantize=...)"
    )


class FolderFormatError(QloraCompileError, ValueError):
    template = (
        "stored_as={value!r}: {reason}; pass stored_as='qlora_compile', which holds every format"
    )


class UnmergeableError(QloraCompileError, ValueError):
    template = "{site} cannot be merged: {reason}; serve base and adapter side by side instead"


class UnmergePlaceError(QloraCompileError, OSError):
    template = (
        "QLORA_COMPILE_UNMERGE={value!r}: the weight from before merging cannot be written there "
        "({problem}); name a folder with space, 'memory' or 'nothing'; unmerge_adapter() takes "
        "back what is merged so far"
    )


class SpreadModelError(QloraCompileError, ValueError):
    template = "the weights of {model} are spread over processes, and {problem}; {remedy}"


class UnknownAdapterError(QloraCompileError, ValueError):
    template = "the model has no adapter {value!r}; choose one of {known}"


class DtypeError(QloraCompileError, ValueError):
    template = "dtype={value!r} cannot be written; choose one of {known}"


class BaseFolderError(QloraCompileError, ValueError):
    template = "{value!r} is the folder that the base model came from; choose another folder"


class SkeletonError(QloraCompileError, ValueError):
    template = (
        "checkpoint= cannot fill this {model}: {problem}; make the model under "
        "torch.device('meta'), of the class that its configuration names"
    )
