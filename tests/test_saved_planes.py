"""Quantised models can be saved: every tensor of a state dict owns its memory."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlora_compile
from bench.stock import with_bitsandbytes
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from tests.format_options import fitting
from tests.hf.test_conv1d import gpt2
from tests.hf.test_experts import toy as experts_toy
from tests.toy_models import toy

BLOCK_SIZES = st.sampled_from(["row", 32, 64, 4096])
SIZES = st.integers(1, 97)
FORMAT_NAMES = st.sampled_from([each.name for each in FORMATS])


def assert_owns_its_memory(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    pointers = [t.untyped_storage().data_ptr() for t in state.values() if t.nbytes]
    assert len(pointers) == len(set(pointers))


@given(
    format=st.sampled_from(FORMATS), block_size=BLOCK_SIZES, n=SIZES, k=SIZES, e=st.integers(1, 5)
)
@settings(max_examples=40)
def test_every_plane_owns_its_memory(
    format: Any, block_size: int | Literal["row"], n: int, k: int, e: int
) -> None:
    for double in {False, format.has_double_quantize}:
        options = fitting(format, block_size, double)
        modules = [
            QuantizedLinear.from_linear(nn.Linear(k, n), format.name, **options),
            *(
                PackedExperts.from_parameter(
                    nn.Parameter(torch.randn(e, n, k)), format.name, transposed=turned, **options
                )
                for turned in (False, True)
            ),
        ]
        for module in modules:
            assert_owns_its_memory(module.state_dict())
            module.requantize(torch.randn(module.packed_shape))
            assert_owns_its_memory(module.to(torch.bfloat16).state_dict())


MODELS = {
    "linear": lambda: toy(tie_word_embeddings=False),
    "conv1d": lambda: untied(gpt2()),
    "experts": lambda: experts_toy("gpt_oss"),
}


def untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def built(
    kind: str, format: str, block_size: int | Literal["row"], double: bool, **lora: Any
) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **lora)
    if format == "bitsandbytes":
        model = with_bitsandbytes(toy(), 4 if double else 8)
        return qlora_compile.optimize(model, config, tune="model")
    options = fitting(format, block_size, double)
    return qlora_compile.optimize(MODELS[kind](), config, quantize=format, tune="model", **options)


@pytest.mark.parametrize("kind", [*MODELS, "bitsandbytes"])
@given(format=FORMAT_NAMES, block_size=BLOCK_SIZES, double=st.booleans(), dora=st.booleans())
@settings(max_examples=5)
def test_an_optimised_model_is_saved_and_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    format: str,
    block_size: int | Literal["row"],
    double: bool,
    dora: bool,
) -> None:
    if kind == "bitsandbytes":
        format = kind
    folder = tmp_path_factory.mktemp("saved")
    model = built(kind, format, block_size, double, use_dora=dora)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_owns_its_memory(model.state_dict())
    save_file(model.state_dict(), folder / "model.safetensors")
    read = load_file(folder / "model.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(folder / "state"))
    read = load_file(folder / "state" / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    if kind == "bitsandbytes":  # which loads none of what it saves by load_state_dict
        return
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    accelerator.load_state(str(folder / "state"))
    loaded = accelerator.unwrap_model(prepared).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
