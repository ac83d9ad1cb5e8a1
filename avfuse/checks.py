"""The checks of the public edge: each raises a ValueError that names the argument and what is wrong."""

import contextlib
import math
import numbers

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_size(name: str, value: tuple[int, int], letters: str = "(height, width)") -> None:
    """A size is a pair of positive integers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be {letters}, got {value!r}")
    for count in value:
        check_count(name, count)


def check_flag(name: str, value: bool) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_positive(name: str, value: float) -> None:
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_rate(name: str, rate: float) -> None:
    if not (is_number(rate) and 0.0 <= rate < 1.0):
        raise ValueError(f"{name} must be a number in [0, 1), got {rate!r}")


def is_number(value: object) -> bool:
    """Whether this is a finite real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_tokens(name: str, tokens: Tensor, dim: int, *, like: Tensor | None = None) -> None:
    """Tokens are floating point (B, N, dim) with N > 0, of the batch size and device of `like`."""
    check_floating_point(name, tokens)
    if tokens.ndim != 3 or tokens.shape[1] == 0 or tokens.shape[2] != dim:
        raise ValueError(f"{name} must be tokens (B, N, {dim}) with N > 0, got shape {tuple(tokens.shape)}")
    if like is not None and tokens.shape[0] != like.shape[0]:
        raise ValueError(f"{name} must have batch size {like.shape[0]}, got {tokens.shape[0]}")
    if like is not None and tokens.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tokens.device}")


def check_floating_point(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {kind_of(tensor)}")


def check_dtype(name: str, tensor: Tensor, weight: Tensor) -> None:
    """An input has the dtype of the weights it meets, or autocast is on, which casts it."""
    if tensor.dtype != weight.dtype and not casts(weight.device):
        raise ValueError(f"{name} must have the dtype of the weights, {weight.dtype}, got {tensor.dtype}")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """A mask is None or a bool tensor of `shape` on `device`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {kind_of(mask)}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on {device}, got {mask.device}")


def check_indices(name: str, indices: Tensor, batch: int, size: int, device: torch.device) -> None:
    """Indices (B, n) long into `size` tokens. Their range is checked on the CPU only: elsewhere it would wait
    for the device.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.long:
        raise ValueError(f"{name} must be a long tensor, got {kind_of(indices)}")
    if indices.ndim != 2 or indices.shape[0] != batch or not 0 < indices.shape[1] <= size:
        raise ValueError(
            f"{name} must be ({batch}, n) with 0 < n <= {size}, got shape {tuple(indices.shape)}"
        )
    if indices.device != device:
        raise ValueError(f"{name} must be on {device}, got {indices.device}")
    traced = torch.compiler.is_compiling() or isinstance(indices, FakeTensor)
    if indices.device.type == "cpu" and indices.numel() and not traced:
        if indices.min() < 0 or indices.max() >= size:
            raise ValueError(
                f"{name} must hold indices in 0..{size - 1}, got {indices.min()}..{indices.max()}"
            )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which the dtype of the inputs decides."""
    if not casts(device):  # entering one all the same would cost more than a kernel launch
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def casts(device: torch.device) -> bool:
    """Whether autocast is on; "meta" has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def kind_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
