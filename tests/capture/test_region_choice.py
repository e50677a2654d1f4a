"""Which modules become regions where the blocks hold nothing to fuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qlora_compile
from qlora_compile.capture.regions import region_of
from qlora_compile.hf.blocks import repeated_blocks
from qlora_compile.report import build_report
from qlora_compile.sites import Inventory
from tests.test_equality import as_rewritten, lora
from tests.toy_models import tokens, toy

__all__ = ["as_rewritten"]


@pytest.mark.usefixtures("as_rewritten")
def test_blocks_without_linears_leave_the_model_around_them_uncompiled() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(8, 4)
            self.head.requires_grad_(requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = qlora_compile.optimize(Model())
    regions = [name for name, module in model.named_modules() if region_of(module) is not None]
    assert regions == ["head"]
    model(torch.randn(3, 8))
    assert qlora_compile.explain(model).fused == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)


class Norms(nn.Module):
    pass


def model_of(**children: nn.Module) -> nn.Module:
    return nn.ModuleDict(children)


def declaring() -> nn.Module:
    model = model_of(first=Block(), rest=nn.ModuleList([Norms(), Norms()]))
    model._repeated_blocks = ["Block"]  # pyright: ignore[reportArgumentType]
    return model


def some(of: type[nn.Module], count: int) -> list[nn.Module]:
    return [of() for _ in range(count)]


MODELS: dict[str, tuple[nn.Module, list[str]]] = {
    "a list": (model_of(a=nn.ModuleList(some(Block, 2))), ["a.0", "a.1"]),
    "a sequence": (model_of(a=nn.Sequential(*some(Block, 2))), ["a.0", "a.1"]),
    "stages": (
        model_of(a=nn.Sequential(*some(Block, 1)), b=nn.Sequential(*some(Block, 2))),
        ["a.0", "b.0", "b.1"],
    ),
    "a longer list without Linears": (
        model_of(a=nn.ModuleList(some(Block, 2)), b=nn.ModuleList(some(Norms, 3))),
        ["a.0", "a.1"],
    ),
    "Linears": (model_of(a=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])), []),
    "several classes": (model_of(a=nn.ModuleList([Block(), Norms()])), []),
    "one block": (model_of(a=nn.ModuleList(some(Block, 1))), []),
    "declared": (declaring(), ["first"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_a_model_that_is_not_of_transformers(name: str) -> None:
    model, expected = MODELS[name]
    assert repeated_blocks(dict(model.named_modules())) == expected


def test_a_model_whose_only_linear_is_kept_is_not_compiled() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    counters.clear()
    model = qlora_compile.optimize(Tied())
    model(torch.tensor([1, 2]))
    assert counters["stats"]["unique_graphs"] == 0
    (site,) = qlora_compile.explain(model).sites
    assert site.reason == "its weight is tied to embedding"


@pytest.mark.usefixtures("as_rewritten")
def test_a_block_that_only_ran_with_a_cache_says_so() -> None:
    model = qlora_compile.optimize(toy(), lora())
    model.eval()(tokens(), use_cache=True)
    assert {site.reason for site in build_report(Inventory(model)).sites[:-1]} == {
        "its block has run with a key-value cache only, uncompiled"
    }
    assert qlora_compile.explain(model).fused == 14
