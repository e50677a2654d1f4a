"""`save_pretrained`, in one process, of a model whose weights FSDP2 spreads over a job of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import qlora_compile
from qlora_compile.saving_errors import SaveOptionError, SpreadModelError
from tests.distributed.jobs import obstacle
from tests.hf.test_experts import toy as toy_experts
from tests.toy_language_model import toy_llama

pytestmark = pytest.mark.skipif(obstacle("fsdp2") is not None, reason=str(obstacle("fsdp2")))

MODELS = {
    "NF4": (toy_llama, "nf4"),
    "INT4 and experts": (lambda: toy_experts("mixtral"), "int4"),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """This process as a job of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def packed(name: str) -> Any:
    make, stored = MODELS[name]
    torch.manual_seed(0)
    return qlora_compile.optimize(make(), quantize=stored, tune="model")


def spread(name: str) -> Any:
    model = packed(name)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for path in folder.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_state_is_written_for_spread_weights(name: str, tmp_path: Path) -> None:
    packed(name).save_pretrained(tmp_path / "whole")
    model = spread(name)
    before = dict(model.named_parameters())
    state: Any = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    state = {key: tensor.clone() for key, tensor in state.items()}
    # So that the test sees which of the two is written.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "given", is_main_process=True, state_dict=state)
    whole, given = weights(tmp_path / "whole"), weights(tmp_path / "given")
    assert given.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(given[key], tensor), key
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is parameter for key, parameter in before.items())


def test_one_process_alone_does_not_wait_for_the_others(tmp_path: Path) -> None:
    model = spread("NF4")
    for state in (None, model.state_dict()):
        with pytest.raises(SpreadModelError, match=r"qlora_compile\.save"):
            model.save_pretrained(tmp_path / "alone", is_main_process=True, state_dict=state)
    with pytest.raises(SpreadModelError, match=r"qlora_compile\.save"):
        model.push_to_hub("owner/name")
    assert not (tmp_path / "alone").exists()


def test_a_process_that_does_not_write_needs_no_state(tmp_path: Path) -> None:
    for model in (packed("NF4"), spread("NF4")):
        model.save_pretrained(tmp_path / "none", is_main_process=False, state_dict={})
        with pytest.raises(SaveOptionError, match="state_dict"):
            model.save_pretrained(tmp_path / "none", is_main_process=True, state_dict={})
    assert not (tmp_path / "none").exists()
