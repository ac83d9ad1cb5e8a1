"""The checks of the public edge: each raises a ValueError that names the argument and what is wrong."""

import contextlib
import math
import numbers

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOATING = "floating point"
KINDS = {"bool": torch.bool, "long": torch.long}


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


def check_tensor(
    name: str,
    tensor: Tensor,
    kind: str,
    *,
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """A tensor that is "floating point", "bool" or "long", of this shape on this device if they are given."""
    is_tensor = isinstance(tensor, Tensor)
    if not is_tensor or not (tensor.is_floating_point() if kind == FLOATING else tensor.dtype == KINDS[kind]):
        got = tensor.dtype if is_tensor else type(tensor).__name__
        raise ValueError(f"{name} must be a {kind} tensor, got {got}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_tokens(name: str, tokens: Tensor, dim: int, *, like: Tensor | None = None) -> None:
    """Tokens are floating point (B, N, dim) with N > 0, of the batch size and device of `like`."""
    check_tensor(name, tokens, FLOATING)
    if tokens.ndim != 3 or tokens.shape[1] == 0 or tokens.shape[2] != dim:
        raise ValueError(f"{name} must be tokens (B, N, {dim}) with N > 0, got shape {tuple(tokens.shape)}")
    if like is not None and tokens.shape[0] != like.shape[0]:
        raise ValueError(f"{name} must have batch size {like.shape[0]}, got {tokens.shape[0]}")
    if like is not None and tokens.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tokens.device}")


def check_dtype(name: str, tensor: Tensor, weight: Tensor) -> None:
    """An input has the dtype of the weights it meets, or autocast is on, which casts all but float64."""
    dtypes = {tensor.dtype, weight.dtype}
    if len(dtypes) > 1 and (torch.float64 in dtypes or not casts(weight.device)):
        raise ValueError(f"{name} must have the dtype of the weights, {weight.dtype}, got {tensor.dtype}")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """A mask is None or a bool tensor of `shape` on `device`."""
    if mask is not None:
        check_tensor(name, mask, "bool", shape=shape, device=device)


def check_indices(
    name: str, indices: Tensor, shape: tuple[int | None, ...], size: int, device: torch.device
) -> None:
    """Indices (long) into `size` tokens; only on the CPU, where nothing waits, also their range. `shape` may
    end on None: any number of them from 1 to `size`.
    """
    check_tensor(name, indices, "long")
    *lead, count = indices.shape or (0,)
    if tuple(lead) != shape[:-1] or not (0 < count <= size if shape[-1] is None else count == shape[-1]):
        wanted = f"({', '.join('n' if n is None else str(n) for n in shape)})"
        most = f" with 0 < n <= {size}" if shape[-1] is None else ""
        raise ValueError(f"{name} must be {wanted}{most}, got shape {tuple(indices.shape)}")
    check_tensor(name, indices, "long", device=device)
    traced = torch.compiler.is_compiling() or isinstance(indices, FakeTensor)
    if indices.device.type == "cpu" and indices.numel() and not traced:
        lowest, highest = indices.min(), indices.max()
        if lowest < 0 or highest >= size:
            raise ValueError(f"{name} must hold indices in 0..{size - 1}, got {lowest}..{highest}")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module does more than its class says: hooks, or a `forward` of its own. Hooks of
    all modules, such as a FLOP counter has, change no path, or what it counts would not be what runs.
    """
    hooks = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    return "forward" in vars(module) or any(getattr(module, kind) for kind in hooks)


def is_plain(linear: nn.Module) -> bool:
    """Whether a product with parts of the weight is all that calling this layer does.

    Not with hooks or adapters, and not where the weight is quantized or distributed.
    """
    return type(linear) is nn.Linear and not (
        has_hooks(linear) or is_traceable_wrapper_subclass(linear.weight)
    )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which the dtype of the inputs decides."""
    if not casts(device):  # entering one all the same would cost more than a kernel launch
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def casts(device: torch.device) -> bool:
    """Whether autocast is on; "meta" has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is recorded, in which nothing can wait for a number."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_differentiating() -> bool:
    """Whether derivatives of what runs may be asked for: gradients, or the tangents of forward mode, which
    `no_grad` leaves on. An operator without an autograd.Function around it would give neither, and say
    nothing.
    """
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Whether torch.export traces. Inside torch.compile its own `is_exporting` is True as well."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
