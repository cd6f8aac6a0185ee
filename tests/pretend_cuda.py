"""A CUDA device where there is none: CPU tensors that say they are on cuda:0 and refuse what a real one would refuse.

Everything is computed on the CPU. What is checked is where tensors lie: operations on tensors of both devices, CPU
generators for tensors on the GPU, CPU tensors indexed by ones on the GPU, and numpy on the GPU raise as they do there.
Code inside backward passes and inside PyTorch's own Python functions is not looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

PRETENDED = torch.device("cuda:0")
MAY_MIX = {"to", "copy_", "type_as", "as_subclass", "__setitem__", "set_", "is_same_size", "_is_view", "record_stream"}
"""Functions that take tensors of several devices, or only look at them."""


class PretendedTensor(torch.Tensor):
    """A tensor in the CPU's memory that says it lies on `PRETENDED`."""

    _absgrad: torch.Tensor

    @property
    def absgrad(self) -> torch.Tensor:
        """What a rasteriser's backward pass, which is not looked into, hangs on its projected means."""
        return self._absgrad

    @absgrad.setter
    def absgrad(self, value: torch.Tensor) -> None:
        self._absgrad = on_pretended(value)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})


class _Everywhere(TorchFunctionMode):
    """Sees factories, too, which take no tensor."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Within it `cuda:0` can be named as a device; its global generator is the CPU's."""
    with (
        mock.patch("torch.cuda.get_rng_state", _get_rng_state),
        mock.patch("torch.cuda.set_rng_state", _set_rng_state),
        _Everywhere(),
    ):
        yield PRETENDED


def _get_rng_state(_device: object = PRETENDED) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, _device: object = PRETENDED) -> None:
    torch.set_rng_state(state)


def on_pretended(value: Any) -> Any:
    """The same tensors (of any nest of tuples, lists and dictionaries), said to lie on `PRETENDED`; objects stay what they are."""

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendedTensor):
            leaf.__class__ = PretendedTensor
        return leaf

    return tree_map(mark, value)


def off_pretended(value: Any) -> Any:
    """The same tensors on the CPU; gradients flow through."""
    with torch._C.DisableTorchFunction():
        return tree_map(
            lambda leaf: leaf.as_subclass(torch.Tensor) if isinstance(leaf, PretendedTensor) else leaf, value
        )


def _call(func: Callable, args: tuple, kwargs: dict) -> Any:
    name = getattr(func, "__name__", "")
    if name == "__reduce_ex__":  # a checkpoint holds plain tensors
        return off_pretended(args[0]).__reduce_ex__(*args[1:])
    own = args[0] if args else None
    if name == "__get__":
        told = {torch.Tensor.device: PRETENDED, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}
        attribute = getattr(func, "__self__", None)
        if isinstance(own, PretendedTensor) and attribute in told:
            return told[attribute]
    if name == "_parse_to":  # reads what a module's `to` was told
        return func(*args, **kwargs)
    if name == "_has_compatible_shallow_copy_type":  # whether a module may move a parameter without making a new one
        return isinstance(args[0], PretendedTensor) == isinstance(args[1], PretendedTensor)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    target, args, kwargs = _device_asked_for(name, args, kwargs)
    if pretended:
        _check(name, own, tensors)
    wraps = target.type == "cuda" if target is not None else _result_is_pretended(name, own, pretended, tensors)
    generators = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    if wraps and generators:
        raise RuntimeError(f"`{name}`: Expected a 'cuda' device type for generator but found 'cpu'")
    with torch._C.DisableTorchFunction():
        out = func(*args, **kwargs)
        if name in ("__set__", "__setitem__", "backward") or isinstance(out, torch.Size):
            return out
        known = {id(tensor) for tensor in tensors}
        return tree_map(lambda leaf: _placed(leaf, wraps, known), out)


def _placed(leaf: Any, wraps: bool, known: set[int]) -> Any:
    """A result on the device where it belongs; what was handed in comes back as the same object."""
    if not isinstance(leaf, torch.Tensor) or (id(leaf) in known and isinstance(leaf, PretendedTensor) == wraps):
        return leaf
    return leaf.as_subclass(PretendedTensor if wraps else torch.Tensor)


def _result_is_pretended(name: str, own: Any, pretended: list, tensors: list) -> bool:
    if name in ("copy_", "set_", "__get__") or (name.endswith("_") and not name.endswith("__")):
        return isinstance(own, PretendedTensor)
    if name in ("to", "type_as") and len(tensors) > 1:
        return isinstance(tensors[1], PretendedTensor)
    if name == "__getitem__":
        return isinstance(own, PretendedTensor)
    return bool(pretended)


def _check(name: str, own: Any, tensors: list[torch.Tensor]) -> None:
    if name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")
    if name in MAY_MIX or name.startswith("new_") or name == "__set__":
        return
    with torch._C.DisableTorchFunction():
        others = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor) and tensor.dim() > 0]
    if name in ("__getitem__", "index_put_", "index_put"):
        if not isinstance(own, PretendedTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        return
    if others:
        raise RuntimeError(f"`{name}`: Expected all tensors to be on the same device, but found cuda:0 and cpu")


def _device_asked_for(name: str, args: tuple, kwargs: dict) -> tuple[torch.device | None, tuple, dict]:
    """The device that a call names, and the call with the CPU in the place of a GPU."""
    if name == "cpu":
        return torch.device("cpu"), args, kwargs
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        return asked, args, {**kwargs, "device": _real(asked)}
    places = [at for at, arg in enumerate(args) if isinstance(arg, (str, torch.device))] if name == "to" else []
    if not places:
        return None, args, kwargs
    asked = torch.device(args[places[0]])
    return asked, (*args[: places[0]], _real(asked), *args[places[0] + 1 :]), kwargs


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "cuda" else device
