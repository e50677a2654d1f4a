"""What a block writes to its input, the caller reads afterwards, as in stock PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qlora_compile
from tests.test_equality import without_inductor

__all__ = ["without_inductor"]

Write = Callable[[Any, Tensor], Any]


def scales(block: Any, x: Tensor) -> Tensor:
    x *= 2
    return x + block.inner(x)


def zeroes_a_column(block: Any, x: Tensor) -> Tensor:
    x[..., 0] = 0.0
    return x + block.inner(x)


def adds_what_is_trained(block: Any, x: Tensor) -> Tensor:
    x += block.inner(x.clone())
    return x


def returns_nothing_of_it(block: Any, x: Tensor) -> Tensor:
    x += block.inner(x.clone())
    return x.new_zeros(())


def returns_a_tuple(block: Any, x: Tensor) -> Any:
    x += block.inner(x.clone())
    return x, None


def through_a_view(block: Any, x: Tensor) -> Tensor:
    x.view(-1).mul_(0.5)
    return block.inner(x)


WRITES: tuple[Write, ...] = (
    *(scales, zeroes_a_column, adds_what_is_trained, returns_nothing_of_it),
    *(returns_a_tuple, through_a_view),
)


class Block(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.inner, self.write = nn.Linear(8, 8), write

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.write(self, hidden_states)


class Stack(nn.Module):
    """Gives its loss what the blocks return and what they leave in their inputs."""

    def __init__(self, write: Write, by_name: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(write) for _ in range(3)])
        self.by_name = by_name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = [self.embed(x)]
        for block in self.blocks:
            x = found[-1] if found[-1].dim() else found[0].detach() + found[-1]
            result = block(hidden_states=x) if self.by_name else block(x)
            found.append(result[0] if isinstance(result, tuple) else result)
        return tuple(found)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("write", WRITES, ids=lambda each: each.__name__)
@pytest.mark.usefixtures("without_inductor")
def test_the_caller_reads_what_was_written(write: Write, by_name: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    stock: Any = get_peft_model(Stack(write, by_name), config).train()  # pyright: ignore[reportArgumentType]
    ours = qlora_compile.optimize(copy.deepcopy(stock), tune="model")
    for _ in range(2):
        x = torch.randn(3, 4)
        results = []
        for model in (stock, ours):
            model.zero_grad()
            outputs = model(x)
            torch.stack([each.square().sum() for each in outputs]).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append({**{str(i): each for i, each in enumerate(outputs)}, **grads})
        expected, actual = results
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert qlora_compile.explain(ours).fused == 3
