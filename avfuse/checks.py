"""The checks of the public edge: each raises a ValueError that names the argument and what is wrong."""

import torch
from torch import Tensor


def check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_rate(name: str, rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {rate}")


def check_tokens(name: str, tokens: Tensor, dim: int, *, like: Tensor | None = None) -> None:
    """Tokens are floating point (B, N, dim) with N > 0, of the batch size and device of `like`."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {kind_of(tokens)}")
    if tokens.ndim != 3 or tokens.shape[1] == 0 or tokens.shape[2] != dim:
        raise ValueError(f"{name} must be tokens (B, N, {dim}) with N > 0, got shape {tuple(tokens.shape)}")
    if like is not None and tokens.shape[0] != like.shape[0]:
        raise ValueError(f"{name} must have batch size {like.shape[0]}, got {tokens.shape[0]}")
    if like is not None and tokens.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tokens.device}")


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


def kind_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
