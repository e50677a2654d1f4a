"""One rank of a job that counts what FSDP2 holds of packed weights, beside stock's."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_compile
from bench.stock import with_bitsandbytes
from qlora_compile.capture import backend
from qlora_compile.kernels import workspace
from tests.distributed.worker import compile_inner


def main() -> None:
    torch.set_num_threads(1)
    backend.compile_inner = compile_inner
    dist.init_process_group("gloo")
    memory()
    dist.destroy_process_group()


def memory() -> None:
    """A rank holds its part of the planes, and in a step two gathered blocks: what the ranks have
    exchanged, and the Parameters that FSDP2 copies out of that. Stock needs no less."""
    # bitsandbytes' scales are no Parameters: every rank has them whole.
    stock = _most(get_peft_model(with_bitsandbytes(_large(), 4), _lora()), scales_whole=True)
    gc.collect()
    model = qlora_compile.optimize(_large(), _lora(), quantize="nf4", tune="model")
    assert _most(model, scales_whole=False) <= 1.1 * stock


def _lora() -> LoraConfig:
    return LoraConfig(r=1, target_modules="all-linear")


def _large() -> Any:
    """A Llama whose planes take 2.7 MB, so that what does not grow with them is little."""
    sizes: Any = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=8, **sizes))


def _most(model: Any, *, scales_whole: bool) -> int:
    """Return the most bytes of planes that a rank holds in a step."""
    layers = model.train().get_base_model().model.layers
    block = sum(each.nbytes for each in layers[0].parameters())
    planes = sum(each.nbytes for each in model.parameters() if _is_plane(each))
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    gc.collect()
    held, seen = _bytes_of_integers(), []
    for layer in layers:
        _watch(layer, seen)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(seen) == 2 * len(layers)
    part = planes / dist.get_world_size()
    assert part <= held <= (1.3 if scales_whole else 1.1) * part
    gathered = block + planes / len(layers)
    assert 0.9 * gathered <= max(seen) - held <= 1.1 * gathered
    return max(seen)


def _watch(block: Any, seen: list[int]) -> None:
    """Note the bytes that are there when `block` runs, and when its backward begins."""

    def look(*_: Any) -> None:
        seen.append(_bytes_of_integers())

    block.register_forward_pre_hook(look)
    block.register_forward_hook(lambda module, args, output: output.register_hook(look) and None)


def _is_plane(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8


def _bytes_of_integers() -> int:
    """The bytes of all live tensors of bytes, each storage once, without the scratch memory that a
    decoded weight passes through: stock's is one of floats."""
    storages = {}
    for each in gc.get_objects():
        # Neither fake tensors, nor weak proxies whose object may be gone.
        if type(each) in (Tensor, nn.Parameter, DTensor) and _is_plane(each):
            local = each.to_local() if isinstance(each, DTensor) else each
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    for scratch in workspace._buffers.by_stream.values():
        storages.pop(scratch.data_ptr(), None)
    return sum(storages.values())


if __name__ == "__main__":
    main()
