"""A model trained by stock PEFT beside an optimised one: every operation is done to both, and a
training step of both is compared after each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import qlora_compile
from qlora_compile.kernels.formats.int8 import INT8
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.modules.linear import QuantizedLinear
from tests.test_equality import lora
from tests.toy_models import VOCABULARY, toy, with_bitsandbytes

OWN_FORMATS = (NF4.name, INT8.name)
BASES = ("plain", *OWN_FORMATS, "bnb-4bit", "bnb-8bit")

TARGETS = (
    ("q_proj",),
    ("down_proj",),
    ("q_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("k_proj", "o_proj", "down_proj"),
)
BLOCK = "base_model.model.model.layers"

Strategy = st.SearchStrategy[Any]
Results = dict[str, Tensor]
Compute = Callable[[], Results]

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}
"""The error allowed, relative to the norm of what is compared."""

ROUNDING = 1.5
BATCHES = 25
"""Where ours differs by more in bfloat16: the distance allowed from what stock computes in float32,
over that of stock's own result, the median of so many batches."""


@dataclass(frozen=True)
class Start:
    """How the two models are made.

    targets: the Linears that get an adapter. thawed: a Linear that is trained in full. attached:
    whether `optimize` attaches the adapters or finds them there.
    """

    base: str = "nf4"
    targets: tuple[str, ...] = ("q_proj",)
    thawed: str | None = None
    attached: str = "before"


class Operation(Protocol):
    def apply(self, pair: Pair) -> None: ...


class DecodedLinear(nn.Linear):
    """A stock Linear with a packed weight's decoded values. A merged weight is rounded like the
    packed one: `packed` is quantised from the sum and decoded again. `unmerged`: the weight
    before."""

    unmerged: PackedWeight | None = None

    def __init__(self, linear: nn.Linear, packed: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = [packed]  # Within a list: no submodule, or its codes would be parameters.
        self.decode(linear.weight.dtype)

    def decode(self, dtype: torch.dtype) -> None:
        self.weight.data = self.packed[0].dequantize(torch.float32).to(dtype)


class Pair:
    """The two models and the state of their use: `rows` is the shape of a batch and `batch` its
    number, `backend` is for a compilation around our model."""

    def __init__(self, start: Start, backend: str) -> None:
        self.start = start
        self.history: list[Operation] = []
        self.stock, self.ours = (self._made(start, optimized) for optimized in (False, True))
        if start.base in OWN_FORMATS:
            for name, module in self.ours.named_modules():
                if isinstance(module, QuantizedLinear):
                    parent, _, leaf = name.rpartition(".")
                    owner = self.stock.get_submodule(parent)
                    decoded = DecodedLinear(getattr(owner, leaf), _twin(module))
                    setattr(owner, leaf, decoded)
        self.rows, self.padded, self.batch = (2, 8), False, 0
        self.autocast = False
        self.backward = "once"
        self.asked: dict[str, bool] = {}
        self.hooks: list[Hooked] = []
        self.seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.backend_outside = backend
        self._outer: Callable[..., Any] | None = None

    @staticmethod
    def _made(start: Start, optimized: bool) -> Any:
        model = toy(attention_bias=True)
        if start.base.startswith("bnb"):
            _round_biases(model)
            model = with_bitsandbytes(model, int(start.base[4]))
        config = lora(target_modules=list(start.targets))
        quantize: Any = start.base if start.base in OWN_FORMATS else None
        torch.manual_seed(1)
        if optimized and start.attached == "in":
            return qlora_compile.optimize(model, config, quantize=quantize, tune="model").train()
        model = get_peft_model(model, config)
        if start.thawed is not None:
            model.get_submodule(start.thawed).requires_grad_(True)
        if optimized:
            model = qlora_compile.optimize(model, quantize=quantize, tune="model")
        return model.train()

    # What operations read.

    @property
    def adapters(self) -> list[str]:
        return list(self.stock.peft_config)

    @property
    def layers(self) -> list[Any]:
        """Stock's adapter layers."""
        return [module for module in self.stock.modules() if hasattr(module, "lora_A")]

    @property
    def merged(self) -> bool:
        return any(layer.merged for layer in self.layers)

    @property
    def disabled(self) -> bool:
        return any(layer.disable_adapters for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision that a step computes in."""
        low = self.autocast or self.stock.get_input_embeddings().weight.dtype == torch.bfloat16
        return torch.bfloat16 if low else torch.float32

    @property
    def checkpointing(self) -> str:
        for module in self.stock.modules():
            if getattr(module, "gradient_checkpointing", False):
                func: Any = module._gradient_checkpointing_func
                return "reentrant" if func.keywords["use_reentrant"] else "nonreentrant"
        return "none"

    # What operations do.

    def both(self, act: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Return the results of `act` on stock's model and on ours, from the same random state."""
        results = []
        for model in (self.stock, self.ours):
            torch.manual_seed(2)
            results.append(act(model))
        return results[0], results[1]

    def both_merging(self, act: Callable[[Any], Any]) -> None:
        """Do `act`, which may change base weights, to both models."""
        self.stock_merging(act)
        act(self.ours)

    def stock_merging(self, act: Callable[[Any], Any]) -> None:
        with _rounded(self.stock):
            act(self.stock)

    def decode(self) -> None:
        """Give stock's Linears the decoded weights anew, in the model's dtype."""
        for module in _decoded(self.stock):
            module.decode(module.weight.dtype)

    @torch.no_grad()
    def share_parameters(self) -> None:
        """Give our model the values of stock's trained weights and adapters."""
        ours = dict(self.ours.named_parameters())
        for name, parameter in self.stock.named_parameters():
            if ours[name].is_floating_point():
                ours[name].copy_(parameter)

    def compile_outside(self, on: bool) -> None:
        self._outer = torch.compile(self.ours, backend=self.backend_outside) if on else None

    @property
    def compiled_outside(self) -> bool:
        return self._outer is not None

    @property
    def quantizes_inputs(self) -> bool:
        """Whether stock quantises what its Linears are given when they do not train, as LLM.int8
        does; the fused op does not."""
        return self.start.base == "bnb-8bit"

    def inputs(self, rows: tuple[int, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        batch, length = rows or self.rows
        generator = torch.Generator().manual_seed(1000 * batch + length + seed + 10**6 * self.batch)
        ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
        if not self.padded:
            return {"input_ids": ids, "labels": ids}
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        return {
            "input_ids": ids.where(mask > 0, 0),
            "labels": ids.where(mask > 0, -100),
            "attention_mask": mask,
        }

    # What is compared.

    def do(self, operation: Operation) -> None:
        self.history.append(operation)
        operation.apply(self)
        self.compare()

    def compare(self) -> None:
        """Assert that a training step of both models is the same."""
        expected, actual = self._stock_step(), self._our_step()
        self.assert_equal(actual, expected, (self._our_step, self._stock_step))

    def assert_equal(
        self, actual: Results, expected: Results, again: tuple[Compute, Compute] | None = None
    ) -> None:
        """again: compute our results and stock's for the present `batch`, to judge by float32's
        where rounding to bfloat16 tells both apart."""
        assert actual.keys() == expected.keys(), (
            f"only stock has {sorted(expected.keys() - actual.keys())}, "
            f"only ours has {sorted(actual.keys() - expected.keys())}"
        )
        tolerance = TOLERANCE[self.dtype]
        sizes = {name: float(value.float().norm()) for name, value in expected.items()}
        gradients = {name for name in expected if "grad " in name or "backward" in name}
        largest = max((sizes[name] for name in gradients), default=0.0)
        for name, value in expected.items():
            assert actual[name].shape == value.shape, name
            assert math.isfinite(sizes[name]), f"stock's {name} is not finite"
            # A gradient near zero is the difference of larger ones.
            size = sizes[name] + (name in gradients) * 1e-2 * largest
            error = float((actual[name].float() - value.float()).norm())
            message = f"{name} differs by {error:.2g} of {size:.2g}"
            if error > tolerance * size and again is not None and self.dtype == torch.bfloat16:
                self._assert_only_rounded(name, actual[name], message, *again)
            else:
                assert error <= tolerance * size, message

    def _assert_only_rounded(
        self, name: str, actual: Tensor, message: str, ours: Compute, stock: Compute
    ) -> None:
        """Assert that our result comes again, and is usually as near to float32's as stock's. In a
        few batches a gradient nearly cancels, and its error is of any size."""
        torch.testing.assert_close(ours()[name], actual, rtol=0.01, atol=1e-6, msg=message)
        errors: dict[Compute, list[float]] = {ours: [], stock: []}
        for self.batch in range(BATCHES):
            exact = self._in_float32(stock)[name].float()
            for compute, found in errors.items():
                found.append(float((compute()[name].float() - exact).norm()))
        self.batch = 0
        mine, theirs = map(statistics.median, errors.values())
        assert mine <= ROUNDING * theirs, (
            f"{message}; the median over {BATCHES} batches differs by {mine:.2g} from float32's, "
            f"stock's by {theirs:.2g}"
        )

    def _in_float32(self, compute: Compute) -> Results:
        """Return what stock computes while its parameters and buffers are in float32."""
        tensors = (*self.stock.parameters(), *self.stock.buffers())
        low = [tensor for tensor in tensors if tensor.dtype == torch.bfloat16]
        values = [tensor.data for tensor in low]
        autocast, self.autocast = self.autocast, False
        self.stock.zero_grad()  # A gradient has its parameter's dtype.
        for tensor, value in zip(low, values, strict=True):
            tensor.data = value.float()
        results = compute()
        self.stock.zero_grad()
        for tensor, value in zip(low, values, strict=True):
            tensor.data = value
        self.autocast = autocast
        return results

    def _stock_step(self) -> Results:
        return self._step(self.stock, self.stock, self.seen[0])

    def _our_step(self) -> Results:
        call = self.ours if self._outer is None else self._outer
        return self._step(self.ours, call, self.seen[1])

    def _step(
        self, model: Any, call: Callable[..., Any], seen: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        model.zero_grad()
        seen.clear()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = call(**self.inputs(), **self.asked)
        results = {"loss": output.loss.detach()[None], "logits": output.logits.detach()}
        for kind in ("hidden_states", "attentions"):
            values = getattr(output, kind, None)
            if values is not None:
                results |= {f"{kind} {i}": v.detach() for i, v in enumerate(values)}
        if output.loss.requires_grad and any(p.requires_grad for p in model.parameters()):
            self._run_backward(model, call, output, results)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[f"grad {name}"] = parameter.grad.detach().clone()
        return results | {f"seen {name}": value for name, value in seen.items()}

    def _run_backward(
        self, model: Any, call: Callable[..., Any], output: Any, results: dict[str, Tensor]
    ) -> None:
        match self.backward:
            case "once":
                output.loss.backward()
            case "twice":
                output.loss.backward(retain_graph=True)
                output.loss.backward()
            case "two losses":
                output.loss.backward(retain_graph=True)
                output.logits.float().square().mean().backward()
            case "accumulated":
                output.loss.backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                    second = call(**self.inputs(seed=1))
                second.loss.backward()
            case "autograd.grad":
                named = {n: p for n, p in model.named_parameters() if p.requires_grad}
                for time in ("first", "second"):
                    gradients = torch.autograd.grad(
                        output.loss, list(named.values()), retain_graph=True, allow_unused=True
                    )
                    for name, gradient in zip(named, gradients, strict=True):
                        if gradient is not None:
                            results[f"{time} grad {name}"] = gradient
            case _:
                raise AssertionError(self.backward)

    def __str__(self) -> str:
        steps = "".join(f"    {operation!r},\n" for operation in self.history)
        return f"play(\n    {self.start!r},\n{steps})"


@dataclass
class Hooked:
    """A hook that both models have: what it is, and the handles that take it off."""

    name: str
    handles: list[Any] = field(default_factory=list)


def play(start: Start, *operations: Operation, backend: str = "aot_eager") -> Pair:
    """Repeat a sequence of operations, as a failure prints it."""
    pair = Pair(start, backend)
    pair.compare()
    for operation in operations:
        pair.do(operation)
    return pair


def _round_biases(model: nn.Module) -> None:
    """Rounds biases to bfloat16: bitsandbytes casts a bias to its input's dtype in place, so that a
    call under autocast would change stock's."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)


def _twin(packed: QuantizedLinear) -> QuantizedLinear:
    with torch.no_grad():
        twin = QuantizedLinear(packed.packed, None, packed.weight_dtype)
    return twin


def _decoded(model: nn.Module) -> list[DecodedLinear]:
    return [module for module in model.modules() if isinstance(module, DecodedLinear)]


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Weights are as decoded in float32 inside; those changed are packed and decoded afterwards."""
    layers = _decoded(model)
    dtypes = [layer.weight.dtype for layer in layers]
    wrappers = {id(m.base_layer): m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    merged = [bool(_merged(wrappers, layer)) for layer in layers]
    for layer in layers:
        layer.decode(torch.float32)
    before = [layer.weight.data.clone() for layer in layers]
    yield
    for layer, dtype, weight, was in zip(layers, dtypes, before, merged, strict=True):
        packed, now = layer.packed[0], _merged(wrappers, layer)
        if now and not was:
            layer.unmerged = packed.packed
        if was and not now and layer.unmerged is not None:
            packed.store(layer.unmerged)  # as ours gives back what was there before
        elif not torch.equal(layer.weight.data, weight):
            packed.requantize(layer.weight.data)
        layer.decode(dtype)


def _merged(wrappers: dict[int, Any], layer: DecodedLinear) -> list[str]:
    wrapper = wrappers.get(id(layer))
    return [] if wrapper is None else wrapper.merged_adapters
