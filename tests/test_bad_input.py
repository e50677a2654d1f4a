"""Each mistake is one clear error, raised before anything was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import qlora_compile
from qlora_compile import errors
from qlora_compile.kernels.formats.errors import FormatOptionError, OptionWithoutFormatError
from tests.toy_models import toy, with_bitsandbytes


def _poisoned(value: float) -> nn.Module:
    model = toy()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    return model


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options)


def _adapted() -> nn.Module:
    return get_peft_model(toy(), _lora())


def _offloaded() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(toy(), torch.device("cpu"))


def _tensor_parallel() -> nn.Module:
    """Return a model sharded as by transformers' tp_plan, over one process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = toy()
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model.model.layers[1].mlp.up_proj, mesh, ColwiseParallel())
    return model


@pytest.fixture(scope="module", autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _rank_zero() -> LoraConfig:
    config = _lora()
    config.r = 0
    return config


Case = tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], tuple[str, ...]]

CASES: dict[str, Case] = {
    "unknown format": (toy, {"quantize": "nf3"}, errors.UnknownFormatError, ("'nf3'", "'nf4'")),
    "block size": (
        toy,
        {"quantize": "nf4", "block_size": 96},
        errors.BlockSizeError,
        ("96", "power of two"),
    ),
    "block size 16": (
        toy,
        {"quantize": "int8", "block_size": 16},
        errors.BlockSizeError,
        ("16", "out of range"),
    ),
    "block size in words": (
        toy,
        {"quantize": "nf4", "block_size": "column"},
        errors.BlockSizeError,
        ("'column'", "'row'"),
    ),
    "an option of another format": (
        toy,
        {"quantize": "nf4", "group_size": 64},
        FormatOptionError,
        ("group_size=64", "'nf4'", "block_size"),
    ),
    "a misspelt option": (toy, {"strcit": True}, OptionWithoutFormatError, ("strcit=True",)),
    "rank 0": (toy, {"lora": _rank_zero()}, errors.AdapterConfigError, ("r=0", "1 or more")),
    "dropout 1": (
        toy,
        {"lora": _lora(lora_dropout=1.0)},
        errors.AdapterConfigError,
        ("lora_dropout=1.0",),
    ),
    "not a config": (toy, {"lora": 16}, errors.AdapterConfigError, ("16", "LoraConfig")),
    "no Linear": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1)),
        {"quantize": "nf4"},
        errors.NoLinearError,
        ("Sequential",),
    ),
    "a lone Linear": (lambda: nn.Linear(4, 4), {"quantize": "nf4"}, errors.NoLinearError, ()),
    "no target": (
        toy,
        {"lora": _lora(target_modules=["query", "qproj"]), "quantize": "nf4"},
        errors.AdapterTargetError,
        ("'qproj'", "q_proj"),
    ),
    "no target among parameters": (
        toy,
        {"lora": _lora(target_modules=[], target_parameters=["no_such"])},
        ValueError,
        ("target_parameters",),
    ),
    "a pattern that matches nothing": (
        toy,
        {"lora": _lora(target_modules=r".*\.query"), "quantize": "nf4"},
        errors.AdapterTargetError,
        (r"'.*\\.query'", "q_proj"),
    ),
    "layers that are not there": (
        toy,
        {"lora": _lora(target_modules=["q_proj"], layers_to_transform=[7]), "quantize": "nf4"},
        ValueError,
        ("layers_to_transform",),
    ),
    "NaN": (
        lambda: _poisoned(float("nan")),
        {"quantize": "nf4", "lora": _lora()},
        errors.WeightValueError,
        ("model.layers.1.mlp.up_proj", "1 NaN"),
    ),
    "infinity": (
        lambda: _poisoned(float("inf")),
        {"quantize": "int8"},
        errors.WeightValueError,
        ("model.layers.1.mlp.up_proj",),
    ),
    "optimised twice": (
        lambda: qlora_compile.optimize(_adapted()),
        {},
        errors.AlreadyOptimizedError,
        ("PeftModel",),
    ),
    "meta device": (
        lambda: toy().to("meta"),
        {"quantize": "nf4"},
        errors.MetaDeviceError,
        ("model.embed_tokens.weight",),
    ),
    "adapters twice": (_adapted, {"lora": _lora()}, errors.AlreadyAdaptedError, ("lora=None",)),
    "quantised twice": (
        lambda: with_bitsandbytes(toy(), 4),
        {"quantize": "nf4"},
        errors.AlreadyQuantizedError,
        ("model.layers.0.self_attn.q_proj", "quantize=None"),
    ),
    "scope": (toy, {"scope": "layer"}, errors.OptionError, ("'layer'", "'block'")),
    "strict without inputs": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        {"strict": True, "quantize": "nf4"},
        errors.NoExampleInputsError,
        ("example_inputs",),
    ),
    "an initialisation that reads the weight": (
        toy,
        {"lora": _lora(init_lora_weights="orthogonal"), "quantize": "nf4"},
        errors.AdapterConfigError,
        ("'orthogonal'",),
    ),
    "offloaded weights": (
        _offloaded,
        {"quantize": "nf4"},
        errors.OffloadedWeightError,
        ("model.embed_tokens.weight", "remove_hook_from_submodules", "device_map"),
    ),
    "tensor parallel": (
        _tensor_parallel,
        {"quantize": "nf4"},
        errors.ShardedWeightError,
        ("model.layers.1.mlp.up_proj.weight", "Shard(dim=0)", "tp_plan", "before fully_shard"),
    ),
    "bitsandbytes and a wrong target": (
        lambda: with_bitsandbytes(toy(), 4),
        {"lora": _lora(target_modules=["qproj"])},
        errors.AdapterTargetError,
        ("'qproj'",),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_changes_nothing(case: str) -> None:
    make, arguments, error, words = CASES[case]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.named_modules())
    instance = {name: dict(module.__dict__) for name, module in modules}
    random_state = torch.get_rng_state()
    with pytest.raises(error) as raised:
        qlora_compile.optimize(model, **arguments)
    for word in words:
        assert word in str(raised.value)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        if value.device.type != "meta":
            assert torch.equal(value.nan_to_num(), after[name].nan_to_num())
    assert list(model.named_modules()) == modules
    assert {name: dict(module.__dict__) for name, module in modules} == instance
    assert torch.equal(torch.get_rng_state(), random_state)


def test_explain_wants_an_optimised_model() -> None:
    with pytest.raises(errors.NotOptimizedError, match="optimize"):
        qlora_compile.explain(toy())


def test_errors_survive_pickling() -> None:
    import pickle

    error = errors.UnknownFormatError(value="nf3", known="'nf4'")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
