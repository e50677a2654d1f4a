"""Prints as JSON what plans do on the fake device, for test_plans.py.

It runs in a separate process, as the tests' may have its kernels decorated for Triton's
interpreter.
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from triton import knobs

from qlora_compile.kernels.dropout import philox4x32
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.plans import first_use, native
from qlora_compile.kernels.selector import Selector
from qlora_compile.kernels.variants.base import LinearTensors
from qlora_compile.kernels.workspace import _buffers, fresh_workspaces, workspace
from qlora_compile.modules.linear import QuantizedLinear
from tests.fake_device.device import FakeDevice, fake_device
from tests.plans.toy_calls import (
    F32,
    TEXT,
    K,
    N,
    call,
    computed_by,
    copying_kernel,
    keys,
    launching,
    multiplying,
    multiplying_decoded,
    plans,
)


def operators(device: FakeDevice) -> dict[str, Any]:
    """Run torch's operators, which do compute here, over shared scratch memory."""

    def body(tensors: LinearTensors) -> Tensor:
        x, (weight,) = tensors.x, tensors.planes
        both = torch.cat([x, x.t().contiguous().t() * 2.0])
        first = workspace(2 * len(x), N, dtype=x.dtype, device=x.device)
        torch.mm(both, weight.t(), out=first)
        second = torch.empty_like(first).copy_(first).add_(1, alpha=3)
        third = torch.empty_like(first)
        torch.sub(second, first.to(torch.float64).sum(0, keepdim=True), out=third)
        y = x.new_zeros(len(x), N)
        return y.add_(third[len(x) :])

    equal = []
    with computed_by(body):
        for _ in range(4):
            x, weight = torch.randn(6, K), torch.randn(N, K)
            tensors = LinearTensors(x, [weight], None, None, None, None, None)
            with fresh_workspaces():
                expected = body(tensors)
            equal.append(torch.equal(call(x=x, weight=weight), expected))
    shared = len(_buffers.by_stream)
    return {"equal": equal, "plans": plans(), "workspaces": shared}


def integers(device: FakeDevice) -> dict[str, Any]:
    """Draw by Philox, whose words are integers that torch multiplies by Python's numbers."""

    def body(tensors: LinearTensors) -> Tensor:
        words = tensors.x.new_ones(len(tensors.x), N).mul_(tensors.x.sum()).to(torch.int64)
        word, *_ = philox4x32([words, 0, 0, 0], 7)
        return (torch.as_tensor(word) + 0x9E3779B9).remainder(1 << 20).to(torch.float32)

    equal = []
    with computed_by(body):
        for _ in range(4):
            x = 100 * torch.randn(6, K)
            tensors = LinearTensors(x, [torch.randn(N, K)], None, None, None, None, None)
            equal.append(torch.equal(call(x=x), body(tensors)))
    return {"equal": equal, "plans": plans(), "report": native.report()}


def short_of_memory(device: FakeDevice) -> dict[str, Any]:
    """Fail while recording, as where there is no room for scratch memory that is not shared."""
    kept: list[int] = []

    def body(tensors: LinearTensors) -> Tensor:
        if _buffers.fresh:
            kept.append(len(_buffers.by_stream))
            if len(kept) == 1:
                raise torch.OutOfMemoryError("no room")
        workspace(6, N, dtype=F32, device=tensors.x.device)
        return multiplying(tensors)

    shapes = []
    with computed_by(body):
        for _ in range(5):
            shapes.append(list(call().shape))
    return {"shapes": shapes, "kept": kept, "plans": plans(), "report": native.report()}


def results(device: FakeDevice) -> dict[str, Any]:
    with computed_by(launching):
        for _ in range(2):
            call()
        found = [call().reshape(-1) for _ in range(2)]
        x = torch.randn(2, 3, K)
        shaped = [call(x=x) for _ in range(3)][-1]
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
    storages = [each.untyped_storage() for each in (*found, shaped)]
    return {
        "bytes": [each.nbytes() for each in storages],
        "apart": len({each.data_ptr() for each in storages}),
        "shape": list(shaped.shape),
        "contiguous": shaped.is_contiguous(),
        "profiled": [e.name for e in profiled.events() or () if e.name.startswith("qlora")],
    }


def refused(device: FakeDevice) -> dict[str, Any]:
    """Return the reasons against replays, with results that stay right."""

    def read(tensors: LinearTensors) -> Tensor:
        return tensors.x.new_full((len(tensors.x), N), tensors.x.sum().item())

    def drawn(tensors: LinearTensors) -> Tensor:
        return torch.rand(len(tensors.x), N) * 0 + tensors.x.sum()

    def viewed(tensors: LinearTensors) -> Tensor:
        return (tensors.x.new_zeros(N, len(tensors.x)) + tensors.x.sum()).t()

    def listed(tensors: LinearTensors) -> Tensor:
        made = tensors.x.sum().expand(len(tensors.x), N).contiguous()
        torch._foreach_add_([made], 0.0)
        return made

    def hidden(tensors: LinearTensors) -> Tensor:
        """Write past torch and Triton, which a replay does not repeat."""
        y = tensors.x.sum().expand(len(tensors.x), N).contiguous()
        copied = y.clone()
        y = torch.empty_like(y).fill_(7)
        ctypes.memmove(y.data_ptr(), copied.data_ptr(), y.nbytes)
        return y

    found = {}
    for body in (read, drawn, viewed, listed, hidden):
        torch.ops.qlora_plans.clear()
        with computed_by(body), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            right = []
            for _ in range(4):
                x = torch.randn(6, K)
                right.append(torch.equal(call(x=x), x.sum().expand(6, N)))
        said = [str(each.message) for each in caught if "other bits" in str(each.message)]
        found[body.__name__] = [right, plans(), native.report(), said]
    return found


def failing(device: FakeDevice) -> dict[str, Any]:
    found = {}
    with computed_by(launching):
        for _ in range(3):
            call()
        for error in (719, 2):
            device.fail(error, after=1)
            try:
                call()
            except RuntimeError as raised:
                found[type(raised).__name__] = str(raised)
        found["after"] = list(call().shape)
    return found


def captured(device: FakeDevice) -> dict[str, Any]:
    with computed_by(launching):
        call()
        with device.capturing():
            call()
            call()
            during = plans()
        call()
        recorded, before = plans(), device.launched
        with device.capturing():
            call()
    return {"during": during, "after": recorded, "launched": device.launched - before}


def ragged(device: FakeDevice) -> dict[str, Any]:
    with computed_by(launching):
        for rows in range(1, 201):
            call(rows)
        once = [plans(), keys()]
        torch.ops.qlora_plans.limit(16)
        before = device.launched
        for _ in range(3):
            for rows in range(1, 33):
                call(rows)
        cycled = [plans(), keys(), device.launched - before]
        for _ in range(3):
            for rows in range(1, 9):
                call(rows)
        kept = [plans(), keys()]
    torch.ops.qlora_plans.limit(2048)
    return {"once": once, "cycled": cycled, "kept": kept}


def keyed(device: FakeDevice) -> dict[str, Any]:
    """Return the keys after three calls of each kind, and the plans."""
    wide = torch.randn(6, 2 * K)
    flat = torch.randn(6 * K + 1)
    ways: dict[str, Callable[[], Any]] = {
        "plain": call,
        "again": call,
        "strides": lambda: call(x=wide[:, :K]),
        "alignment": lambda: call(x=flat[1:].view(6, K)),
        "settings": lambda: _with_determinism(call),
        "batch": lambda: call(x=torch.randn(2, 3, K)),
    }
    found = {}
    with computed_by(launching):
        for name, way in ways.items():
            for _ in range(3):
                way()
            found[name] = keys()
        found["plans"] = plans()
        selector = Selector("plans")
        found["a new selector"] = plans()
        for _ in range(3):
            call()
        before = plans()
        selector.forget_records()
        found["other choices"] = [before, plans()]
    return found


def _with_determinism(run: Callable[[], Any]) -> None:
    torch.use_deterministic_algorithms(False)
    run()
    torch.use_deterministic_algorithms(True, warn_only=True)


def threaded(device: FakeDevice) -> dict[str, Any]:
    """Run two threads that look up, record and evict; see whether Python runs during launches."""
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with assuming("sm_90", kind="cpu"):
            for _ in range(300):
                rows = int(torch.randint(1, 7, (1,), generator=generator))
                if call(rows).shape != (rows, N):
                    wrong.append(rows)

    def wait() -> None:
        with assuming("sm_90", kind="cpu"):
            call(9)

    torch.ops.qlora_plans.limit(4)
    with computed_by(launching):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        stuck = [each.is_alive() for each in threads]
        for _ in range(3):
            call(9)
        device.charge(0.1)
        waiting, ticks = threading.Thread(target=wait), 0
        waiting.start()
        while waiting.is_alive():
            time.sleep(0.002)
            ticks += 1
        device.charge(0)
    torch.ops.qlora_plans.limit(2048)
    return {"wrong": wrong, "stuck": stuck, "ticks": ticks}


def differentiated(device: FakeDevice) -> dict[str, Any]:
    """Two threads that each run backwards of their own, in turn inside of another backward, while
    plans of both directions are looked up, recorded by Python and evicted."""
    weight = torch.randn(N, K)
    wrong: list[int] = []
    errors: list[str] = []
    together = threading.Barrier(2)

    def squares(x: Tensor) -> Tensor:
        return call(x=x, weight=weight).square()

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with assuming("sm_90", kind="cpu"):
            together.wait(60)
            for turn in range(150):
                rows = int(torch.randint(1, 7, (1,), generator=generator))
                x = torch.randn(rows, K, generator=generator).requires_grad_()
                y = squares(x) if turn % 3 else checkpoint(squares, x, use_reentrant=True)
                torch.autograd.backward(y.sum())
                expected = 2 * (x.detach() @ weight.t()) @ weight
                if x.grad is None or not torch.allclose(x.grad, expected, atol=1e-4):
                    wrong.append(rows)

    def guarded(seed: int) -> None:
        try:
            work(seed)
        except Exception as error:  # an error of a thread would be lost
            errors.append(str(error))

    torch.ops.qlora_plans.limit(5)
    with computed_by(multiplying):
        threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(120)
        stuck = [each.is_alive() for each in threads]
        bounded = keys()
        torch.ops.qlora_plans.limit(2048)
        x = torch.randn(3, K)
        for _ in range(3):
            torch.autograd.backward(squares(x.requires_grad_()).sum())
        return {
            **{"wrong": wrong, "errors": errors, "stuck": stuck, "keys": bounded},
            "plans": plans(),
        }


def transformed(device: FakeDevice) -> dict[str, Any]:
    """A packed Linear under transforms of torch.func, whose calls have plans otherwise."""
    linear = QuantizedLinear.from_linear(nn.Linear(64, N, bias=False), "nf4")
    weight, x = linear.dequantize(), torch.randn(6, 64)

    def squares(x: Tensor) -> Tensor:
        return linear(x).square()

    with computed_by(multiplying_decoded):
        for _ in range(3):
            squares(x)
        before = [plans(), keys(), device.launched]
        gradient = torch.func.grad(lambda x: squares(x).sum())(x)
        mapped = torch.func.vmap(squares)(torch.stack([x, 2 * x]))
        after = [plans(), keys(), device.launched]
    expected = (x @ weight.t()).square()
    return {
        "before": before,
        "after": after,
        "gradient": torch.allclose(gradient, 2 * (x @ weight.t()) @ weight, atol=1e-4),
        "mapped": torch.allclose(mapped, torch.stack([expected, 4 * expected]), atol=1e-4),
    }


def elsewhere(device: FakeDevice) -> dict[str, Any]:
    """Try what never uses a plan: fakes, traces, subclasses, hooked launches, off(), gradients."""
    from qlora_compile.kernels.op import QLORA_LINEAR

    weight = torch.randn(N, K)
    called: list[Any] = []

    def hook(metadata: Any) -> None:
        called.append(metadata)

    with computed_by(launching):
        for _ in range(3):
            call()
        count = plans()
        with FakeTensorMode() as mode:
            fake = call(x=mode.from_tensor(torch.randn(6, K)), weight=mode.from_tensor(weight))
        traced = make_fx(lambda x: QLORA_LINEAR(x, [weight], None, TEXT)[0])(torch.randn(6, K))
        wrapped = TwoTensor(torch.randn(6, K), torch.randn(6, K))
        pair = call(x=wrapped, weight=TwoTensor(weight, weight))
        y = call(x=torch.randn(6, K, requires_grad=True))
        with device.recording() as launches, native.off():
            call()
        by_python = [plans() - count, len(launches)]
        knobs.runtime.launch_enter_hook.add(hook)
        native.heed()
        call()
        knobs.runtime.launch_enter_hook.remove(hook)
        hooked = len(called)
        native.heed()
        call()
    return {
        "fake": type(fake).__name__,
        "targets": [str(node.target) for node in traced.graph.nodes if node.op == "call_function"],
        "subclass": type(pair).__name__,
        "differentiable": y.requires_grad,
        "by python": by_python,
        "hooked": [hooked, len(called)],
    }


def living(device: FakeDevice) -> dict[str, Any]:
    """Check that compiled kernels outlive Triton's own cache."""
    with computed_by(launching):
        for _ in range(3):
            call()
        used = [weakref.ref(each) for each in first_use._kept.values()]
        copying_kernel.device_caches.clear()
        gc.collect()
        before = device.launched
        call()
    return {"alive": [each() is not None for each in used], "launched": device.launched - before}


SECTIONS = (
    *(operators, integers, short_of_memory, results, refused, failing, captured, ragged, keyed),
    *(threaded, differentiated, transformed, elsewhere, living),
)


def main() -> None:
    torch.set_num_threads(1)
    # Results of kernels are NaN here, and not what memory happens to hold.
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = {}
    with fake_device("sm_90") as device:
        native.install("CPU")
        for section in SECTIONS:
            torch.ops.qlora_plans.clear()
            found[section.__name__] = section(device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
