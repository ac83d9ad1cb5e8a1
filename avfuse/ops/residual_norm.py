"""Residual sum and norm of tokens, written behind the norms of context tokens.

    total = tokens + update,    norm = layer norm of [context; total]

What a pre-norm block does between two products, in one pass over the tokens; and in another, backward, the
gradients of all that goes in. Without weights of its own the norm is what `avfuse.folding` needs, where the
product that follows takes them up.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checks import casts, check_choice, has_hooks, is_differentiating
from .operators import ResidualNorm
from .pair_attention import HAS_TRITON, TRITON_DTYPES, runs_kernels

# Numbers that blocks have in their tokens before the kernel takes the place of a norm: its launch takes a
# host 74 us, that of PyTorch's norm 18 and of its sum 10 (an H200's, 2026-11-28), so it pays where the GPU
# has enough to do meanwhile: from where on depends on the host, and a recorded step has none
# (kernels/README.md). 2^19, 14 clips of 49 tokens of 768, is reckoned, not measured.
ENOUGH = 2**19


def residual_norm(
    tokens: Tensor,
    update: Tensor | None = None,
    context: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) + update (B, N, D), and the norms of context (B, F, D) and that sum, (B, F + N, D).

    Args:
        weight, bias: of the norm, (D,); None = 1 and 0.
        backend: "triton" or "torch"; None picks the kernel where it can run. Second derivatives need "torch".

    Returns:
        The sum, which is `tokens` itself without an update, and the norms, in the dtype of the sum. Under
        autocast the kernel gives the norms in autocast's: what takes them is a product.

    Raises:
        ValueError: naming the argument whose shape or dtype a kernel cannot take.
    """
    check_choice("backend", backend, (None, "triton", "torch"))
    if backend == "triton" and tokens.dtype not in TRITON_DTYPES:  # it would compute in float32
        raise ValueError(f"backend='triton' takes float32, float16 or bfloat16, got tokens of {tokens.dtype}")
    if backend == "triton" or (backend is None and kernel_can_run(tokens)):
        return _triton(tokens, update, context, weight, bias, eps)
    total, union = _sum_and_union(tokens, update, context)
    return total, F.layer_norm(union, union.shape[-1:], weight, bias, eps)


def sum_and_norm(
    norm: nn.Module, tokens: Tensor, update: Tensor | None = None, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`tokens` + `update`, and `norm` of [context; that sum]: by the kernel where the tokens hold `ENOUGH`
    numbers, and this is all that calling the module does; else by calling it.
    """
    if kernel_can_run(tokens) and tokens.numel() >= ENOUGH and _is_plain(norm, tokens):
        return _triton(tokens, update, context, norm.weight, norm.bias, norm.eps)
    total, union = _sum_and_union(tokens, update, context)
    return total, norm(union)


def normed(norm: nn.Module, tokens: Tensor) -> Tensor:
    """`norm` of tokens (B, N, D), by the same choice."""
    return sum_and_norm(norm, tokens)[1]


def kernel_can_run(tokens: Tensor) -> bool:
    """torch.compile makes a kernel of its own from what plain PyTorch does."""
    if not tokens.is_cuda or not HAS_TRITON or torch.compiler.is_compiling():
        return False
    return tokens.dtype in TRITON_DTYPES and runs_kernels(tokens.device)


def _is_plain(norm, tokens):
    """Whether the kernel can take the place of this norm of tokens."""
    if not is_layer_norm(norm) or norm.normalized_shape != tokens.shape[-1:]:
        return False
    return not (has_hooks(norm) or is_traceable_wrapper_subclass(norm.weight))


def is_layer_norm(module: nn.Module) -> bool:
    """Of PyTorch's class or timm's, which computes the same."""
    return type(module) in (nn.LayerNorm, LayerNorm)


def _triton(tokens, update, context, weight, bias, eps):
    _check_shapes(tokens, update, context, weight, bias)
    dtype = tokens.dtype if update is None else torch.promote_types(tokens.dtype, update.dtype)
    if casts(tokens.device):
        dtype = torch.get_autocast_dtype(tokens.device.type)
    inputs = tokens, update, context, weight, bias, eps, dtype
    if is_differentiating():
        return ResidualNorm.apply(*inputs)
    norm, *total = torch.ops.avfuse.residual_norm(*inputs)
    return total[0] if total else tokens, norm


def _check_shapes(tokens, update, context, weight, bias):
    """A kernel would read past the end of what is too small."""
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, N, D), got shape {tuple(tokens.shape)}")
    B, N, D = tokens.shape
    expected = dict(update=(B, N, D), context=(B, "F", D), weight=(D,), bias=(D,))
    for (name, shape), x in zip(expected.items(), (update, context, weight, bias), strict=True):
        if x is not None and (
            x.ndim != len(shape) or any(n not in ("F", m) for n, m in zip(shape, x.shape, strict=True))
        ):
            raise ValueError(f"{name} must be {shape} beside tokens {B, N, D}, got shape {tuple(x.shape)}")


def _sum_and_union(tokens, update, context):
    total = tokens if update is None else tokens + update
    return total, total if context is None else torch.cat([context, total], dim=1)
