"""DDP: a block whose adapters exceed one of its buckets stays one graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel

import qlora_compile
from qlora_compile.capture import backend
from qlora_compile.capture.regions import region_of
from tests.distributed.worker import compile_inner
from tests.toy_language_model import toy_llama

FIRST_BUCKET = 2**20  # bytes, DDP's own


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """This process as a job of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stepped(rank: int, *, verify: bool, distributed: bool) -> Any:
    torch.compiler.reset()
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = qlora_compile.optimize(
        toy_llama(), lora, quantize="nf4", tune="model", verify=verify
    ).train()
    ids = torch.arange(16)[None]
    called = DistributedDataParallel(model) if distributed else model
    called(input_ids=ids, labels=ids).loss.backward()
    return model


def graphs(model: Any) -> list[list[dict[str, int]]]:
    """Return for each block the graphs that it ran, each by its sites and their calls' ranks."""
    regions = [region_of(block) for block in model.get_base_model().model.layers]
    return [
        [
            {site: fused.forward.rank for site, fused in graph.fused.items()}
            for graph, _ in (region and region.graphs) or ()
        ]
        for region in regions
    ]


# By DDP's buckets, torch would cut elsewhere for each rank: between siblings, before an adapter.
@pytest.mark.parametrize(
    ("rank", "verify"), [(320, False), (384, False), (512, False), (384, True)]
)
def test_a_block_beyond_a_bucket_is_one_graph(
    rank: int, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "compile_inner", compile_inner)
    alone = stepped(rank, verify=verify, distributed=False)
    block = alone.get_base_model().model.layers[0]
    trained = sum(p.nbytes for p in block.parameters() if p.requires_grad)
    assert trained > FIRST_BUCKET
    model = stepped(rank, verify=verify, distributed=True)
    assert graphs(model) == graphs(alone)
    assert [len(block) for block in graphs(model)] == [1, 1]
    report = qlora_compile.explain(model)
    assert not report.mismatches
    assert len(report.certificates) == (1 if verify else 0)
