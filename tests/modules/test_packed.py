"""The state of modules that hold packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from qlora_compile.errors import LayoutTextError, LayoutVersionError, StoredLayoutError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.layout import Layout
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.modules.packed import PackedModule
from tests.format_options import fitting

each_format = pytest.mark.parametrize("quant_format", FORMATS, ids=lambda f: f.name)


def linear(quant_format: QuantFormat, seed: int = 0, **options: Any) -> QuantizedLinear:
    torch.manual_seed(seed)
    options = {"double_quantize": quant_format.has_double_quantize, **options}
    return QuantizedLinear.from_linear(nn.Linear(96, 5), quant_format.name, **options)


def experts(quant_format: QuantFormat, seed: int = 0) -> PackedExperts:
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(3, 5, 96))
    return PackedExperts.from_parameter(weight, quant_format.name, transposed=False)


@each_format
@pytest.mark.parametrize("build", [linear, experts])
def test_safetensors_hold_the_whole_weight_and_its_layout(quant_format: QuantFormat, build) -> None:
    saved: PackedModule = build(quant_format)
    state = load(save(saved.state_dict()))
    assert Layout.from_tensor(state["packed_layout"]) == Layout.parse(saved.layout)
    loaded = build(quant_format, seed=1)
    assert not torch.equal(loaded.dequantize(), saved.dequantize())
    loaded.load_state_dict(state)
    assert torch.equal(loaded.dequantize(), saved.dequantize())


@each_format
def test_a_state_dict_without_a_layout_is_loaded(quant_format: QuantFormat) -> None:
    """State dicts of earlier versions hold only the planes."""
    saved, loaded = linear(quant_format), linear(quant_format, seed=1)
    state = saved.state_dict()
    del state["packed_layout"]
    loaded.load_state_dict(state)
    assert torch.equal(loaded.dequantize(), saved.dequantize())


@each_format
def test_a_weight_that_is_stored_in_another_way_is_refused(quant_format: QuantFormat) -> None:
    """Also if the planes have the same shapes, and before anything is loaded."""
    others = [f for f in FORMATS if f is not quant_format]
    usual = quant_format.layout((5, 96))
    drawn = [fitting(quant_format, size) for size in (32, 128, "row")]
    unusual = [options for options in drawn if quant_format.layout((5, 96), **options) != usual]
    assert unusual or not quant_format.options
    changed = [linear(quant_format, **options) for options in unusual[:1]]
    for other in [*changed, *map(linear, others)]:
        model: Any = nn.Sequential(linear(quant_format, seed=1))
        before = model[0].dequantize()
        state = {f"0.{name}": value for name, value in other.state_dict().items()}
        with pytest.raises(StoredLayoutError) as raised:
            model.load_state_dict(state)
        for named in ("0: ", other.layout, model[0].layout):
            assert named in str(raised.value)
        assert torch.equal(model[0].dequantize(), before)


@pytest.mark.parametrize(
    ("stored", "error"),
    [([], LayoutVersionError), ([9, 110], LayoutVersionError), ([1, 255], LayoutTextError)],
)
def test_what_is_no_layout_is_refused(stored: list[int], error: type[Exception]) -> None:
    model = linear(FORMATS[0])
    state = model.state_dict() | {"packed_layout": torch.tensor(stored, dtype=torch.uint8)}
    with pytest.raises(error):
        model.load_state_dict(state)


@each_format
@pytest.mark.parametrize("build", [linear, experts])
def test_casting_changes_no_plane(quant_format: QuantFormat, build) -> None:
    module = build(quant_format)
    before = [tensor.clone() for tensor in module.tensors]
    module.to(torch.bfloat16)
    for tensor, kept in zip(module.tensors, before, strict=True):
        assert tensor.dtype == kept.dtype
        assert torch.equal(tensor, kept)
