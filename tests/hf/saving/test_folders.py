"""What a kind of folder does not refuse, it stores whole: every layout that a format can make, with
every value that its planes can hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_compile
from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.sources import source_of
from qlora_compile.hf.saving.folders.folder_format import FolderFormat
from qlora_compile.hf.saving.folders.registry import FOLDERS
from qlora_compile.hf.saving.shards import Shards
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.errors import FormatOptionValueError
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import FORMATS, format_named
from qlora_compile.saving_errors import FolderFormatError
from tests.hf.saving.test_save import HELD, assert_same, dense, packed, read
from tests.hf.test_conv1d import gpt2

SHAPE = (16, 256)


def every_weight(quant_format: QuantFormat) -> Iterator[PackedWeight]:
    """Yield a weight of every layout, as it is packed, and with any bytes in its planes of bytes.
    Other libraries' weights may have bytes that packing does not make, such as a zero of 16."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=chance)
    stored = [option for option in quant_format.options if option.stored]
    for values in itertools.product(*(option.values for option in stored)):
        options = dict(zip([option.name for option in stored], values, strict=True))
        try:
            made = quant_format.quantize(weight, **options)
        except FormatOptionValueError:
            continue
        yield made
        drawn = [_any_bytes(each, chance) for each in made.tensors]
        yield quant_format.packed(made.layout, drawn)


def _any_bytes(plane: Tensor, chance: torch.Generator) -> Tensor:
    if plane.dtype != torch.uint8:
        return plane
    return torch.randint(0, 256, plane.shape, generator=chance).to(torch.uint8)


def stored_again(packed: PackedWeight, kind: FolderFormat, folder: Path) -> PackedWeight:
    """Return the weight as it is read from a folder of that kind."""
    folder.mkdir(parents=True)
    shards = Shards(folder, kind.stem, 1 << 30, single=kind.single)
    for name, tensor in kind.tensors("layer.", packed, torch.float32):
        shards.add(name, tensor)
    shards.finish()
    settings = kind.quantization_config({"layer": packed}, [], torch.float32)
    source = source_of(settings)
    assert source is not None
    opened = CheckpointFolder(folder, source.stem)
    (found,) = source.weights(opened, settings)
    assert found.name == "layer.weight"
    return found.read(opened)


def decoded(packed: PackedWeight) -> Tensor:
    return format_named(packed.format).dequantize(packed, torch.float32)


@pytest.mark.parametrize("quant_format", FORMATS, ids=lambda each: each.name)
def test_every_layout_is_stored_whole_or_refused(quant_format: QuantFormat, tmp_path: Path) -> None:
    for number, weight in enumerate(every_weight(quant_format)):
        kinds = [kind for kind in FOLDERS if kind.obstacle({"layer": weight}) is None]
        assert kinds[-1] is FOLDERS[-1]
        for kind in kinds:
            again = stored_again(weight, kind, tmp_path / f"{number} {kind.name}")
            torch.testing.assert_close(
                decoded(again),
                decoded(weight),
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda text, kind=kind, weight=weight: f"{kind.name} {weight.layout}: {text}",
            )


@pytest.mark.parametrize("held", [each for each in HELD if HELD[each][2] != FOLDERS[-1].name])
def test_conv1ds_are_stored_where_the_reader_turns_them(held: str, tmp_path: Path) -> None:
    """Else in our folder, and what was asked for is refused."""
    format, options, name = HELD[held]
    # On AVX-512 CPUs bitsandbytes 0.50.2 decodes blocks that straddle rows of 32 wrongly.
    sized: dict[str, Any] = {} if name == "compressed-tensors" else {"block_size": 32}
    model = qlora_compile.optimize(gpt2().to(torch.bfloat16), quantize=format, **(sized | options))
    found = qlora_compile.save(model, tmp_path)
    turns = all(kind.turns_conv1d for kind in FOLDERS if kind.name == name)
    assert found == (name if turns else FOLDERS[-1].name)
    if turns:
        loaded: Any = type(model).from_pretrained(tmp_path)
        for path, weight in dense(model).items():
            assert torch.equal(read(loaded.get_submodule(path)), weight), path
    else:
        loaded = qlora_compile.load(tmp_path, dtype=torch.bfloat16)
        assert_same(loaded.state_dict(), model.state_dict())
        with pytest.raises(FolderFormatError, match="c_attn is a Conv1D"):
            qlora_compile.save(model, tmp_path / "other", stored_as=name)


def test_one_weight_that_a_folder_cannot_hold_keeps_all_out(tmp_path: Path) -> None:
    """A zero of 16, as GPTQ's version 1 has, in one weight of many."""
    model = packed("INT4")
    first = model.model.layers[0].mlp.up_proj
    first.zeros.data[0] = 16
    assert qlora_compile.save(model, tmp_path) == FOLDERS[-1].name
    again = qlora_compile.load(tmp_path, dtype=torch.bfloat16)
    assert_same(again.state_dict(), model.state_dict())
