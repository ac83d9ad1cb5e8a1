"""Residual sum and norm of tokens, written behind the norms of context tokens: one pass, one launch.

    total = tokens + update
    z     = [context; total]                         (B, F + N, D)
    norm  = (z - mean z) / sqrt(var z + eps)         mean and variance over the D numbers of a token

A program owns one token, which it reads once. Sums are float32; `total` is rounded to the dtype of the tokens
before its norm is taken, as it is where another operator reads it.
"""

import torch
import triton
import triton.language as tl

from .tiles import on_device_of


@triton.jit(do_not_specialize=["F", "N"])
def residual_norm_kernel(
    tokens, update, context, total, norm, F, N, eps: tl.float32, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    b, place = row // (F + N), row % (F + N)
    columns = tl.arange(0, BLOCK_D)
    own = columns < tl.where(place < F, 0, D)  # of a token that is summed; else `others`, of the context
    others = columns < tl.where(place < F, D, 0)
    offsets = (b * N + place - F) * D + columns
    z = tl.load(tokens + offsets, mask=own, other=0.0)
    if update is not None:
        z = (z.to(tl.float32) + tl.load(update + offsets, mask=own, other=0.0).to(tl.float32)).to(z.dtype)
        tl.store(total + offsets, z, mask=own)
    if context is not None:
        z += tl.load(context + (b * F + place) * D + columns, mask=others, other=0.0)
    z = z.to(tl.float32)
    centred = tl.where(columns < D, z - tl.sum(z, 0) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    tl.store(norm + row * D + columns, centred * scale, mask=columns < D)


def forward(tokens, update, context, eps):
    """Tokens and update (B, N, D), context (B, F, D); update and context may be None -> [norm (B, F + N, D)],
    with an update also total (B, N, D).
    """
    tokens = tokens.contiguous()
    update, context = (None if x is None else x.contiguous() for x in (update, context))
    B, N, D = tokens.shape
    F = 0 if context is None else context.shape[1]
    total = None if update is None else torch.empty_like(tokens)
    norm = tokens.new_empty((B, F + N, D))
    with on_device_of(tokens):
        residual_norm_kernel[(B * (F + N),)](
            tokens, update, context, total, norm, F, N, eps, D=D, **settings(D)
        )  # fmt: skip
    return [norm] if total is None else [norm, total]


def settings(D):
    """Launch options: 8 elements for a thread, which 16-bit types load at once."""
    block = triton.next_power_of_2(D)
    return dict(BLOCK_D=block, num_warps=max(1, min(8, block // 256)))
