"""save: writes a packed model into a folder, which is replaced as a whole."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from qlora_compile.errors import OptionError
from qlora_compile.hf.saving.base_tensors import BaseTensors
from qlora_compile.hf.saving.folders.folder_format import FolderFormat, named
from qlora_compile.hf.saving.folders.registry import FOLDERS
from qlora_compile.hf.saving.model_card import CARD, model_card
from qlora_compile.hf.saving.replacement import replaced
from qlora_compile.hf.saving.shards import USUAL_SIZE, Shards, size_in_bytes
from qlora_compile.hf.saving.whole_weights import (
    SAVED_ALONE,
    given_weights,
    is_spread,
    whole_weights,
)
from qlora_compile.saving_errors import (
    FolderFormatError,
    NothingPackedError,
    RivalWeightsError,
    SaveOptionError,
    SpreadModelError,
)

_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")

ADAPTERS = "adapter"
"""The folder, inside that of a saved model, that holds the adapters of a PeftModel."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    stored_as: str | None = None,
    max_shard_size: int | str = USUAL_SIZE,
) -> str:
    """Write a packed model into `folder`, and return the kind of folder that was written.

    model: a transformers model with packed weights, or a PeftModel over one. For a PeftModel the
    base is written, and the adapters as PEFT files in `folder`/adapter.

    stored_as: "bitsandbytes" (NF4, FP4, and INT8 by row), "compressed-tensors" (INT4 in groups of
    neighbouring columns with integer zeros or none, unless there are Conv1Ds) or "qlora_compile"
    (everything). None for the first of these that can hold the model. transformers loads each by
    `from_pretrained` with the library of that name, ours after `import qlora_compile` (transformers
    5.18 or newer); without it, transformers finds no weights in our folder and raises an OSError.

    max_shard_size: the largest size of a file, in bytes or as text such as "5GB".

    The folder is replaced as a whole, so that an interruption leaves the old or the new one; other
    files in it stay.

    If the weights of `model` are spread over processes, as by FSDP2 or ZeRO-3, all of them call
    this. Process 0 gathers the packed weights in its memory and writes; the others return "".

    Raises, always before anything is written, except for UnfinishedSaveError:
        SavedModelTypeError: the model is not a transformers model.
        NothingPackedError: none of its weights is packed.
        FolderFormatError: `stored_as` cannot hold it.
        OptionError: there is no such kind of folder.
        MergedWeightsError: an adapter is merged into a packed weight.
        ForeignLayerError: another library's layer could not be packed.
        ShardSizeError: max_shard_size is not a size.
        OutputDirectoryError: the folder cannot be written.
        RivalWeightsError: the folder holds weights of another kind.
        UnfinishedSaveError: writing has failed; what was there before is unchanged.
    """
    limit = size_in_bytes(max_shard_size)
    with whole_weights(model) as writes:
        return _save(model, Path(folder), stored_as, limit) if writes else ""


def _save(model: nn.Module, target: Path, stored_as: str | None, limit: int) -> str:
    tensors = BaseTensors(model)
    kind = _chosen(tensors, stored_as)
    stays = other_files(target, kind.stem)
    with replaced(target, stays) as fresh:
        shards = Shards(fresh, kind.stem, limit, single=kind.single)
        for name, tensor in tensors.plain.items():
            shards.add(name, tensor)
        for name, packed in tensors.packed.items():
            for key, plane in kind.tensors(f"{name}.", packed, tensors.dtypes[name]):
                shards.add(key, plane)
        shards.finish()
        base = tensors.model
        settings = kind.quantization_config(tensors.packed, tensors.unpacked, base.dtype)
        write_configs(base, fresh, quantization_config=settings)
        if not (target / CARD).exists():
            (fresh / CARD).write_text(model_card(tensors, kind), encoding="utf-8")
        if isinstance(model, PeftModel):
            model.save_pretrained(str(fresh / ADAPTERS))
    return kind.name


def _chosen(tensors: BaseTensors, stored_as: str | None) -> FolderFormat:
    if not tensors.packed:
        raise NothingPackedError(model=type(tensors.model).__name__)
    known = list(dict.fromkeys(kind.name for kind in FOLDERS))
    if stored_as not in (None, *known):
        listed = ", ".join(map(repr, known))
        raise OptionError(option="stored_as", value=stored_as, known=listed)
    reasons = []
    for kind in FOLDERS:
        if stored_as in (None, kind.name):
            reason = kind.obstacle(tensors.packed) or _turned(kind, tensors)
            if reason is None:
                return kind
            reasons.append(reason)
    raise FolderFormatError(value=stored_as, reason=reasons[0])


def _turned(kind: FolderFormat, tensors: BaseTensors) -> str | None:
    """Return a reason against the folder if its reader would not turn the weight of a Conv1D."""
    if kind.turns_conv1d or not tensors.conv1ds:
        return None
    return f"{tensors.conv1ds[0]} is a Conv1D, and transformers would not transpose its weight"


def other_files(folder: Path, stem: str) -> Callable[[Path], bool]:
    """Return whether a file of `folder` stays when weights named after `stem` are written there.

    The folder of adapters stays, unless such weights lie beside it: then a former save wrote both.

    Raises:
        RivalWeightsError: it holds weights under another name.
    """
    paths = list(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        is_weights = path.name.endswith(
            (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
        )
        if is_weights and not path.name.startswith((stem, "adapter", "training_args")):
            raise RivalWeightsError(value=str(folder), file=path.name)

    def is_own(path: Path) -> bool:
        return path.name.startswith(stem) and ".safetensors" in path.name

    saved_before = any(map(is_own, paths))
    return lambda path: not is_own(path) and not (saved_before and path.name == ADAPTERS)


def write_configs(
    model: PreTrainedModel, folder: Path, *, config: Any = None, **changes: Any
) -> None:
    """Write config.json with `changes`, generation_config.json and a custom model's code.

    config: None for the model's own.
    """
    config = copy.deepcopy(model.config if config is None else config)
    config.dtype = named(model.dtype)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    for name in ("quantization_config", "_is_quantized"):
        if hasattr(config, name):
            delattr(config, name)
    for name, value in changes.items():
        setattr(config, name, value)
    if model._auto_class is not None:
        custom_object_save(model, str(folder), config=config)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))


class SavePacked:
    """Takes the place of `save_pretrained` and `push_to_hub` of a model with packed weights.

    transformers' own methods would write codes as if they were weights, and a model card that does
    not say how to load them. Adapters that transformers has attached are saved by transformers.
    This is an object, so as to be copied and pickled with the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = USUAL_SIZE,
        **options: Any,
    ) -> None:
        if self._has_adapters:
            kept = {"is_main_process": is_main_process, "state_dict": state_dict}
            kept |= {"push_to_hub": push_to_hub, "max_shard_size": max_shard_size, **options}
            type(self.model).save_pretrained(self.model, save_directory, **kept)
            return
        for name in ("variant", "distributed_checkpoint"):
            if options.get(name):
                raise SaveOptionError(option=name)
        if not is_main_process:
            return  # the others' state_dict may be empty, as accelerate's is
        if state_dict is not None and set(state_dict) != set(self.model.state_dict()):
            raise SaveOptionError(option="state_dict")
        with self._alone(state_dict):
            save(self.model, save_directory, max_shard_size=max_shard_size)
        if push_to_hub:
            self._push(Path(save_directory), options)

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str | None = None, **options: Any
    ) -> str:
        """Save the model and upload it, with its model card unless the repository has one; return
        the URL of the commit. Arguments are those of transformers' `push_to_hub`."""
        size = USUAL_SIZE if max_shard_size is None else max_shard_size
        if self._has_adapters:
            own = type(self.model).push_to_hub
            return own(self.model, repo_id, max_shard_size=size, **options)
        if options.get("tags"):
            raise SaveOptionError(option="tags")
        with tempfile.TemporaryDirectory(prefix="qlora_compile-") as folder:
            with self._alone(None):
                save(self.model, folder, max_shard_size=size)
            return self._push(Path(folder), {"repo_id": repo_id, **options}, keeps_card=True)

    def _alone(self, state_dict: Any) -> AbstractContextManager[None]:
        """Let this process save the model without the others, which may not call this.

        Raises:
            SpreadModelError: the weights are spread, and there is no whole state_dict.
        """
        if not is_spread(self.model):
            return nullcontext()
        if state_dict is None:
            raise SpreadModelError(model=type(self.model).__name__, **SAVED_ALONE)
        return given_weights(self.model, state_dict)

    @property
    def _has_adapters(self) -> bool:
        return getattr(self.model, "_hf_peft_config_loaded", False)

    def _push(self, folder: Path, options: dict[str, Any], keeps_card: bool = False) -> str:
        from huggingface_hub import HfApi

        api = HfApi(token=options.get("token"))
        name = options.get("repo_id") or folder.resolve().name
        repository = api.create_repo(name, private=options.get("private"), exist_ok=True).repo_id
        kept = keeps_card and api.file_exists(repository, CARD, revision=options.get("revision"))
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=options.get("revision"),
            commit_message=options.get("commit_message") or "Upload model",
            commit_description=options.get("commit_description"),
            create_pr=options.get("create_pr", False),
            ignore_patterns=[CARD] if kept else None,
        )


def save_packed(modules: Iterable[nn.Module]) -> None:
    """Replace `save_pretrained` and `push_to_hub` of all transformers models among `modules`."""
    module: Any
    for module in modules:
        if isinstance(module, PreTrainedModel):
            saving = SavePacked(module)
            setattr(module, "save_pretrained", saving)  # noqa: B010
            setattr(module, "push_to_hub", saving.push_to_hub)  # noqa: B010
