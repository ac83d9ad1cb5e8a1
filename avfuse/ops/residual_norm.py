"""Residual sum and norm of tokens, written behind the norms of context tokens.

    total = tokens + update,    norm = standardized([context; total])

What a pre-norm block does between two products, in one pass over the tokens. The norm has no weights: a
product that follows can take them up (`avfuse.folding`). For inference: where a gradient is needed, plain
PyTorch runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice
from .pair_attention import HAS_TRITON, TRITON_DTYPES, runs_kernels


def residual_norm(
    tokens: Tensor,
    update: Tensor | None = None,
    context: Tensor | None = None,
    *,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) + update (B, N, D), and the norms of context (B, F, D) and that sum, (B, F + N, D).

    Args:
        backend: "triton" or "torch"; None picks the kernel where it can run and no gradient is needed.

    Returns:
        The sum, which is `tokens` itself without an update, and the norms, in the dtype of `tokens`.
    """
    check_choice("backend", backend, (None, "triton", "torch"))
    inputs = tokens, update, context
    if backend == "triton" or (backend is None and _kernel_can(*inputs)):
        norm, *total = torch.ops.avfuse.residual_norm(*inputs, eps)
        return total[0] if total else tokens, norm
    total = tokens if update is None else tokens + update
    union = total if context is None else torch.cat([context, total], dim=1)
    return total, F.layer_norm(union, union.shape[-1:], eps=eps)


def _kernel_can(tokens, *others) -> bool:
    """torch.compile makes a kernel of its own from what plain PyTorch does."""
    if not tokens.is_cuda or not HAS_TRITON or torch.compiler.is_compiling():
        return False
    if tokens.dtype not in TRITON_DTYPES or not runs_kernels(tokens.device):
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (tokens, *others)))
