"""The floor: only the products, attention and head of a step, on weights that are already decoded.

All that a faster implementation could hide is left out: decoding, norms, activations, rotations,
residuals, casts, autograd's bookkeeping and the optimiser. Attention and head are torch's, or the
faster of torch's and ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.peers.settings import Setting
from qlora_compile.kernels.attention import ATTENTION, attention_call, expected
from qlora_compile.kernels.head_loss import chunked_cross_entropy


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


class _Products:
    """All products of one Linear and its adapter, forward and backward, into memory made once."""

    def __init__(self, weight: Tensor, setting: Setting, *, first: bool) -> None:
        (n, k), dtype = weight.shape, weight.dtype
        rows, rank = setting.tokens, setting.rank
        # PEFT's adapters of a model in bfloat16 are float32, and so are their products outside
        # autocast.
        wide = dtype if setting.autocast else torch.float32
        normal = partial(_normal, device=weight.device)
        self.weight, self.first = weight, first
        self.x, self.grad = normal(rows, k, dtype=dtype), normal(rows, n, dtype=dtype)
        self.wide_x, self.wide_grad = self.x.to(wide), self.grad.to(wide)
        self.a, self.b = normal(rank, k, dtype=wide), normal(n, rank, dtype=wide)
        self.low = self.wide_x @ self.a.t()
        self.y, self.wide_y = torch.empty_like(self.grad), torch.empty_like(self.wide_grad)
        self.grad_x, self.wide_grad_x = torch.empty_like(self.x), torch.empty_like(self.wide_x)
        self.grad_low = torch.empty_like(self.low)
        self.grad_a, self.grad_b = torch.empty_like(self.a), torch.empty_like(self.b)

    def forward(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)
        torch.mm(self.wide_x, self.a.t(), out=self.low)
        torch.mm(self.low, self.b.t(), out=self.wide_y)

    def backward(self) -> None:
        torch.mm(self.wide_grad, self.b, out=self.grad_low)
        torch.mm(self.wide_grad.t(), self.low, out=self.grad_b)
        torch.mm(self.grad_low.t(), self.wide_x, out=self.grad_a)
        if not self.first:  # Nobody asks for the embedding's gradient.
            torch.mm(self.grad, self.weight, out=self.grad_x)
            torch.mm(self.grad_low, self.a, out=self.wide_grad_x)


class Floor:
    """The floor of a Llama-like model; calling it runs one step. ours: whether to take our
    attention and head if they are faster than torch's."""

    def __init__(self, model: Any, setting: Setting, *, ours: bool = False) -> None:
        config = model.config
        self.products = []
        # One set of operands for every shape: as many layers' would not fit the caches any better.
        shapes: dict[tuple[bool, tuple[int, ...]], _Products] = {}
        for layer, block in enumerate(model.model.layers):
            for name, linear in block.named_modules():
                if isinstance(linear, nn.Linear):
                    first = layer == 0 and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")
                    key = (first, tuple(linear.weight.shape))
                    if key not in shapes:
                        shapes[key] = _Products(linear.weight.detach(), setting, first=first)
                    self.products.append((shapes[key], linear.weight.detach()))
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        shape = (setting.batch_size, heads, setting.length, width)
        self.layers = config.num_hidden_layers
        self.head = model.get_output_embeddings().weight.detach()
        normal = partial(_normal, dtype=torch.bfloat16, device=self.head.device)
        self.qkv = [normal(*shape).requires_grad_() for _ in range(3)]
        self.attended = normal(*shape)
        self.hidden = normal(setting.tokens, self.head.shape[1]).requires_grad_()
        self.labels = torch.randint(len(self.head), (setting.tokens,), device=self.head.device)

        self.attention, self.loss = self._torch_attention, self._torch_loss
        if ours:
            if expected(*self.qkv):
                self.attention = _faster(self._torch_attention, self._our_attention)
            self.loss = _faster(self._torch_loss, self._our_loss)

    def __call__(self) -> None:
        for products, weight in self.products:
            products.weight = weight
            products.forward()
        for _ in range(self.layers):
            self.attention()
        self.loss()
        for products, weight in reversed(self.products):
            products.weight = weight
            products.backward()

    def _torch_attention(self) -> None:
        q, k, v = self.qkv
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, self.qkv, self.attended)

    def _our_attention(self) -> None:
        y = ATTENTION(*self.qkv, None, attention_call(True, None))
        torch.autograd.grad(y, self.qkv, self.attended)

    def _torch_loss(self) -> None:
        logits = functional.linear(self.hidden, self.head)
        loss = functional.cross_entropy(logits.float(), self.labels)
        torch.autograd.grad(loss, self.hidden)

    def _our_loss(self) -> None:
        loss = chunked_cross_entropy(self.hidden, self.head, self.labels)
        torch.autograd.grad(loss, self.hidden)


def _faster(*ways: Callable[[], None]) -> Callable[[], None]:
    """Return the function with the least time of three runs, after one run that compiles."""
    for way in ways:
        way()
    seconds = {way: float("inf") for way in ways}
    for _ in range(3):
        for way in ways:
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    return min(ways, key=seconds.__getitem__)
