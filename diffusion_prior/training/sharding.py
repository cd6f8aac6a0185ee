"""Networks split over processes (PyTorch's FSDP2): each holds a part of every weight, gradient, optimiser state and average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

UNITS = ("SpatioTemporalResBlock", "TransformerSpatioTemporalModel", "CLIPEncoderLayer")
"""Classes whose weights are gathered together, used and given up again."""


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Split a network over all processes, in place.

    Raises:
        RuntimeError: where no processes were started together.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("sharding needs several processes: start the training by `accelerate launch` or `torchrun`.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no channels-last kernels
    for module in network.modules():
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def whole(value: Any) -> Any:
    """A nested state with every split tensor gathered; all processes must ask for it together."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: whole(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    return value


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as another one is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def fit_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Split the states of an optimiser, as a checkpoint holds them, like their parameters, and order them so in memory.

    The fused optimiser goes through parameter and states in the order of their bytes, whatever their strides. Whole
    networks keep kernels channels-last, split ones do not: a state from the one would meet the wrong weights of the other.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                fitting = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                state[name] = fitting.copy_(split_like(value, parameter))


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Within, parts of a split network can be used by themselves; all processes must do the same meanwhile."""
    _of_units(network, FSDPModule.unshard)
    try:
        yield
    finally:
        _of_units(network, FSDPModule.reshard)


def make_whole(network: nn.Module) -> None:
    """Gather a split network for good, as plain parameters, for saving."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                full = cast(DTensor, parameter.detach()).full_tensor()
                setattr(module, name, nn.Parameter(full, parameter.requires_grad))


def _of_units(network: nn.Module, call: Callable[[FSDPModule], Any]) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            call(module)
