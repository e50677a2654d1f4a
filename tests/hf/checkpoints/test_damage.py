"""A damaged checkpoint of every source gives one error that names file, tensor and remedy, or the
same weights; never a half-loaded model, other numbers, or an error of another kind."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

import qlora_compile
from bench.coverage import kinds
from qlora_compile.checkpoint_errors import CheckpointError, CheckpointMethodError
from qlora_compile.errors import ModelNotFoundError
from qlora_compile.hf.checkpoints.sources import SOURCES
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.saving_errors import PackedFolderVersionError
from tests.examples import LONG
from tests.hf.checkpoints.damage import WAYS
from tests.hf.checkpoints.written import KINDS, saved_by_transformers, written
from tests.toy_models import toy

COUNT = 300 if LONG else 20
CLEAN = (
    CheckpointError,
    CheckpointMethodError,
    ModelNotFoundError,
    PackedFolderVersionError,
)


def small() -> Any:
    return toy(num_hidden_layers=1, attention_bias=True)


def of_kind(name: str, folder: Path) -> None:
    merged = KINDS[name].merged
    written(folder, kinds.built(kinds.KINDS["gpt_oss"]) if merged else small(), KINDS[name])


def of_transformers(config: Any, folder: Path) -> None:
    saved_by_transformers(folder, small(), config)


def of_ours(folder: Path) -> None:
    qlora_compile.save(qlora_compile.optimize(small(), quantize="nvfp4", tune="model"), folder)


FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)

WRITERS: dict[str, Callable[[Path], None]] = {
    "bitsandbytes, 4 bits": functools.partial(of_transformers, FOUR_BITS),
    "bitsandbytes, 8 bits": functools.partial(of_transformers, EIGHT_BITS),
    "torchao": functools.partial(of_transformers, TorchAoConfig(Float8WeightOnlyConfig())),
    "qlora_compile": of_ours,
    **{name: functools.partial(of_kind, name) for name in KINDS},
}


@functools.cache
def pristine(name: str) -> tuple[Path, dict[str, Tensor]]:
    """Return a folder, and the weights that are read from it."""
    folder = Path(tempfile.mkdtemp(prefix="qlora_compile_checkpoint_"))
    WRITERS[name](folder)
    shutil.rmtree(folder / "dense", ignore_errors=True)
    return folder, weights(qlora_compile.load(folder, dtype=torch.float32))


def weights(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, PackedExperts)):
            found[f"{name}.decoded"] = module.dequantize()
        else:
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            found |= {f"{name}.{each}": tensor.detach() for each, tensor in own}
    return found


def outcome(folder: Path) -> Any:
    """Return the model, or the message of a clean error."""
    try:
        return qlora_compile.load(folder, dtype=torch.float32)
    except CLEAN as error:
        return str(error)


OTHERS = {
    "bitsandbytes, 4 bits": "bitsandbytes",
    "torchao": "torchao",
    "qlora_compile": "qlora_compile",
}
ONE_OF_EACH = (*OTHERS, *{kind.method: name for name, kind in KINDS.items()}.values())


def test_every_source_is_damaged() -> None:
    damaged = {*OTHERS.values(), *(kind.method for kind in KINDS.values())}
    assert damaged == {source.method for source in SOURCES}


@settings(max_examples=COUNT, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_one_clean_error_or_the_same_weights(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(WRITERS) if LONG else ONE_OF_EACH), label="source")
    folder, expected = pristine(name)
    way = data.draw(st.sampled_from(WAYS), label="damage")
    with tempfile.TemporaryDirectory() as place:
        damaged = Path(place) / "model"
        shutil.copytree(folder, damaged)
        way(data.draw, damaged)
        loaded = outcome(damaged)
    if isinstance(loaded, str):
        note(loaded)
        assert str(damaged) in loaded
        assert "; " in loaded  # before the remedy
        return
    found = weights(loaded)
    assert found.keys() == expected.keys()
    for each, tensor in expected.items():
        assert torch.equal(found[each], tensor), each
