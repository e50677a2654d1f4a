"""Loads models and tokenizers from a folder, a GGUF file or a Hub name."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import GENERATION_CONFIG_NAME

from qlora_compile.checkpoint_errors import CheckpointHeadError, CheckpointMethodError
from qlora_compile.errors import MissingPackageError, ModelNotFoundError, TokenizerMissingError
from qlora_compile.hf.checkpoints.folder import CheckpointFolder, readable_gguf
from qlora_compile.hf.checkpoints.reading import quantization_settings, read_model
from qlora_compile.hf.checkpoints.side_files import add_settings_beside, generation_config
from qlora_compile.hf.checkpoints.sources import SOURCES, source_of
from qlora_compile.kernels.cpu.instructions import product_dtype
from qlora_compile.modules.linear import QuantizedLinear

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def compute_dtype() -> torch.dtype:
    """Return bfloat16 if this machine multiplies it natively, else float32.

    A CPU without native bfloat16 converts for every multiplication: ten times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return product_dtype(torch.bfloat16)


def compute_device() -> str:
    """Return the kind of device that the Trainer would train on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# What transformers raises for a damaged config.json, depending on the damage.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_UNREADABLE += (StrictDataclassError,)


def load_config(source: str | Path) -> Any:
    """Read a model's configuration, without its weights.

    Raises:
        ModelNotFoundError: nothing is there, or it is not a model.
        CheckpointError: it is a GGUF file that cannot be read, or modelopt's settings cannot.
    """
    folder, options = _location(source)
    if "gguf_file" in options:
        with readable_gguf(source):
            return AutoConfig.from_pretrained(folder, **options)
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except _UNREADABLE as error:
        raise _not_found(source, error) from error
    if not options and quantization_settings(config) is None:
        add_settings_beside(folder, config)
    return config


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    config: Any = None,
    head: str = "causal",
    labels: Sequence[str] = (),
    device: torch.device | str = "cpu",
    keeps_blocks: bool = False,
) -> Any:
    """Load a model in the class its configuration names; `dtype` None means `compute_dtype()`.

    The weights of a quantised checkpoint stay packed; the package that wrote it is not needed.

    head: "causal" for that class, "score" for one number for each text, "classes" for logits of
    `labels`; both with a new head unless the checkpoint has one. device: where the weights of a
    quantised checkpoint go. keeps_blocks: whether weights of a GGUF file stay packed if a format
    holds their blocks; if not, all are decoded.

    Raises:
        ModelNotFoundError: nothing is there, or it is not a model.
        CheckpointMethodError: nothing here reads quantised checkpoints of this kind.
        CheckpointHeadError: a quantised checkpoint has no head of that kind.
        CheckpointError: a file of a quantised checkpoint cannot be read.
    """
    folder, options = _location(source)
    config = load_config(source) if config is None else config
    chosen: torch.dtype = (
        compute_dtype() if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    )
    settings = quantization_settings(config)
    if settings is not None and not options:
        if head != "causal":
            raise CheckpointHeadError(file=source, value=settings.get("quant_method"))
        return _load_quantised(source, config, settings, chosen, device)
    named = getattr(transformers, architecture(config) or "", AutoModelForCausalLM)
    if head != "causal":
        named = AutoModelForSequenceClassification
        names = list(labels) or ["score"]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        if getattr(config, "pad_token_id", None) is None:  # it ends the text that is classified
            config.pad_token_id = _first(getattr(config, "eos_token_id", None))
    if "gguf_file" in options:
        if keeps_blocks and head == "causal":
            model = _load_blocks(Path(source), config, chosen, device)
            if model is not None:
                return model
        # Decode the weights: Trainer refuses a model whose config says that they are GGUF's blocks.
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        return named.from_pretrained(folder, config=config, dtype=chosen, **options)
    except OSError as error:
        raise _not_found(source, error) from error


def _load_blocks(
    path: Path, config: Any, dtype: torch.dtype, device: torch.device | str
) -> Any | None:
    """Load a GGUF file; None if only transformers reads its architecture, if anything does."""
    from qlora_compile.hf.checkpoints.gguf import GgufFile, GgufSource

    named = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    file = None if named is None else GgufFile(path, named, config)
    if file is None or not file.is_known:
        return None
    model = read_model(named, config, file, GgufSource(), dtype=dtype, device=device)
    model.name_or_path = model.config.name_or_path = str(path)
    return model


def _load_quantised(
    source: str | Path,
    config: Any,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    reader = source_of(settings)
    if reader is None:
        raise CheckpointMethodError(
            file=source,
            value=settings.get("quant_method"),
            known=", ".join(each.method for each in SOURCES),
        )
    path = Path(source)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise _not_found(source, error) from error
    named = getattr(transformers, architecture(config) or "", None)
    named = named or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    folder = CheckpointFolder(path, reader.stem)
    model = read_model(named, config, folder, reader, dtype=dtype, device=device)
    # What transformers does for a folder that it reads itself; PEFT writes the name to adapters.
    model.name_or_path = model.config.name_or_path = str(source)
    if model.can_generate() and (path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = generation_config(path)
    return model


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def with_adapter(model: Any, folder: str | Path) -> Any:
    """Return the PeftModel of a model with the adapter that PEFT has saved in `folder`.

    A packed base was stored as an initialisation such as PiSSA's has left it, so PEFT must not
    initialise from it again. MiCA's name is kept: PEFT computes by it.
    """
    config = PeftConfig.from_pretrained(str(folder))
    packed = any(isinstance(each, QuantizedLinear) for each in model.modules())
    if packed and isinstance(config, LoraConfig) and config.init_lora_weights != "mica":
        config.init_lora_weights = True
    return PeftModel.from_pretrained(model, str(folder), config=config)


def is_quantised(config: Any) -> bool:
    """Whether a configuration belongs to a quantised checkpoint, whose weights stay packed."""
    return quantization_settings(config) is not None


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer that is stored with a model.

    Raises:
        TokenizerMissingError: there is none.
    """
    if not has_tokenizer(source):
        raise TokenizerMissingError(site=f"the data for {str(source)!r}")
    folder, options = (str(source), {}) if Path(source).is_dir() else _location(source)
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except OSError as error:
        raise TokenizerMissingError(site=f"the data for {str(source)!r}") from error


def has_tokenizer(source: str | Path) -> bool:
    """Whether a folder holds tokenizer files; True for any GGUF file and Hub name."""
    path = Path(source)
    return not path.is_dir() or any((path / name).is_file() for name in _TOKENIZER_FILES)


def architecture(config: Any) -> str | None:
    """Return the name of the model class in a configuration, None if it has none, as in GGUF."""
    names = getattr(config, "architectures", None)
    return names[0] if names else None


def is_causal(class_name: str | None) -> bool:
    """Whether a model class predicts the next token, so that its labels are its inputs.

    An unknown class, None, counts as one.
    """
    if class_name is None:
        return True
    known = class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return known or class_name.endswith("ForCausalLM")


def longest_sequence(config: Any) -> int | None:
    """Return a model's number of positions, None if its configuration states no limit."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None  # XLNet's is -1


def text_config(config: Any) -> Any:
    """Return the part of a model's configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _location(source: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(
                value=str(source), problem="the file does not exist", remedy="check the path"
            )
        if find_spec("gguf") is None:
            raise MissingPackageError(
                purpose=f"reading {str(source)!r}", package="gguf", extra="demo"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                value=str(source),
                problem="the folder has no config.json",
                remedy="pass a folder written by save_pretrained, or a .gguf file",
            )
        return str(path), {}
    if path.is_file():
        raise ModelNotFoundError(
            value=str(source),
            problem="this is a file",
            remedy="pass the folder it lies in, or a .gguf file",
        )
    # A Hub name is "name" or "owner/name"; any other text must be a local path, and is missing.
    text = str(source)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text:
        raise ModelNotFoundError(
            value=text, problem="the folder does not exist", remedy="check the path"
        )
    return text, {}


def _not_found(source: str | Path, error: Exception) -> ModelNotFoundError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ModelNotFoundError(
        value=str(source),
        problem=reason,
        remedy="pass an existing folder, a .gguf file, a Hub name, or demo",
    )
