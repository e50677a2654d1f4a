"""PEFT's and transformers' counts of parameters: a packed weight counts as the one it was."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import qlora_compile
from qlora_compile.kernels.registry import FORMATS
from tests.toy_models import toy

FORMAT_NAMES = [each.name for each in FORMATS]


def config() -> LoraConfig:
    return LoraConfig(r=3, target_modules=["q_proj", "o_proj"])


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {"Llama": toy, "experts": mixtral}


def counts(model: Any) -> tuple[Any, ...]:
    return (
        model.get_nb_trainable_parameters(),
        *(model.num_parameters(trained, embedded) for trained in (0, 1) for embedded in (0, 1)),
        model.model.num_parameters(),
    )


def loaded(model: Any, folder: Path) -> Any:
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    return model


MOVES: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "cast": lambda model, _: model.to(torch.bfloat16),
    "meta": lambda model, _: model.to("meta"),
    "load_state_dict": loaded,
    "attached again": lambda model, _: get_peft_model(model.unload(), config()),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_unquantised_model(
    name: str, format: str, double: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = get_peft_model(MODELS[name](), config())
    ours = qlora_compile.optimize(
        MODELS[name](), config(), quantize=format, double_quantize=double, tune="model"
    )
    expected = counts(stock)
    assert counts(ours) == expected
    for move, apply in MOVES.items():
        assert counts(apply(copy.deepcopy(ours), tmp_path)) == expected, move
    stock.print_trainable_parameters()
    ours.print_trainable_parameters()
    printed, ours_printed = capsys.readouterr().out.splitlines()
    assert ours_printed == printed


def attached_from_files(model: Any, folder: Path) -> Any:
    get_peft_model(toy(), config()).save_pretrained(str(folder))
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


@pytest.mark.parametrize(
    "attach", [lambda model, _: get_peft_model(model, config()), attached_from_files]
)
def test_adapters_that_are_attached_later(
    attach: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    ours = qlora_compile.optimize(toy(), quantize="nf4", tune="model")
    assert ours.num_parameters() == toy().num_parameters()
    assert counts(attach(ours, tmp_path)) == counts(get_peft_model(toy(), config()))
