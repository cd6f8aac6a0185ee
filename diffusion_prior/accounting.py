"""What a computation costs, counted on the meta device: floating-point operations and bytes, without doing or holding any of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What one call takes."""

    flops: int
    """Floating-point operations of matrix products, convolutions and attention; a multiplication and an addition are two."""
    peak_bytes: int
    """Most bytes of intermediate tensors alive at once: no weights, no inputs, no workspaces of kernels."""


def cost_of(call: Callable[[], Any]) -> Cost:
    """Count one call on tensors of the meta device.

    Attention counts as a fused kernel does it: its matrix of scores is never stored.
    """
    memory, attention = _LiveBytes(), _FusedAttention()
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(memory)
        # in the module itself: a mode would not be seen by what backward passes compute anew
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        result = call()
    del result
    return Cost(flops=counter.get_total_flops() + attention.flops, peak_bytes=memory.peak)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of networks, each counted in the precision that it has."""
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )


class _FusedAttention:
    """Stands in for scaled dot product attention: gives a result of its shape, and counts what it would have done."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        products = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self.flops += products
        return _Attention.apply(query, key, value, lambda: self._backward(products))  # pyright: ignore

    def _backward(self, products: int) -> None:
        """Scores anew, then the gradients of queries, keys, values and scores: five products for the forward's two."""
        self.flops += products * 5 // 2


class _Attention(torch.autograd.Function):
    """The shapes of attention and of its gradients; keeps its arguments and its result, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Callable[[], None]) -> Tensor:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result)
        ctx.count = count
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.count()
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _LiveBytes(TorchDispatchMode):
    """Sums up the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
