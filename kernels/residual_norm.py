"""Residual sum and norm of tokens, written behind the norms of context tokens: one pass, one launch.

    total = tokens + update
    z     = [context; total]                         (B, F + N, D)
    y     = (z - mean z) r,   r = 1 / sqrt(var z + eps)    mean and variance over the D numbers of a token
    norm  = y weight + bias

Backward, of the gradients dnorm and dtotal, with g = dnorm weight:

    dz         = r (g - mean g - y mean(g y))        of a context token that of context
    dtokens    = dz + dtotal, and so that of update
    dweight    = sum of dnorm y over all tokens,     dbias = sum of dnorm

A program of the forward owns one token, which it reads once. Those of the backward walk over the tokens, a
tile at a time, and keep what they add up over tokens in registers; mean and r they compute again, of what is
read anyway. Sums are float32; `total` is rounded to its dtype before its norm is taken, as it is where
another operator reads it.
"""

import torch
import triton
import triton.language as tl

from .tiles import on_device_of

TILE = 2048  # numbers that a program of the backward holds of each tensor, of one token at least


@triton.jit(do_not_specialize=["F", "N"])
def residual_norm_kernel(
    tokens, update, context, tokens_stride, update_stride, context_stride, weight, bias, total, norm,
    F, N, eps: tl.float32, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, place = row // (F + N), row % (F + N)
    columns = tl.arange(0, BLOCK_D)
    own = columns < tl.where(place < F, 0, D)  # of a token that is summed; else `others`, of the context
    others = columns < tl.where(place < F, D, 0)
    offsets = (place - F) * D + columns
    z = tl.load(tokens + b * tokens_stride + offsets, mask=own, other=0.0).to(tl.float32)
    if update is not None:
        z += tl.load(update + b * update_stride + offsets, mask=own, other=0.0).to(tl.float32)
        z = z.to(total.dtype.element_ty)
        tl.store(total + b * N * D + offsets, z, mask=own)
        z = z.to(tl.float32)
    if context is not None:
        offsets = place * D + columns
        z += tl.load(context + b * context_stride + offsets, mask=others, other=0.0).to(tl.float32)
    centred = tl.where(columns < D, z - tl.sum(z, 0) / D, 0.0)
    y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps))
    if weight is not None:
        y *= tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(norm + row * D + columns, y, mask=columns < D)


@triton.jit(do_not_specialize=["F", "N", "tokens"])
def residual_norm_backward_kernel(
    norm_grad, total_grad, total, context, norm_stride, grad_stride, total_stride, context_stride,
    weight, tokens_grad, update_grad, context_grad, sums,
    F, N, tokens, eps: tl.float32, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)[None, :]
    if weight is not None:
        w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_N, tokens, tl.num_programs(0) * BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        b, place = row // (F + N), row % (F + N)
        present = (row < tokens) & (columns < D)
        own, others = present & (place >= F), present & (place < F)
        place = place * D + columns
        offsets = place - F * D
        z = tl.load(total + b * total_stride + offsets, mask=own, other=0.0).to(tl.float32)
        if context is not None:
            z += tl.load(context + b * context_stride + place, mask=others, other=0.0).to(tl.float32)
        grad = tl.load(norm_grad + b * norm_stride + place, mask=present, other=0.0).to(tl.float32)
        centred = tl.where(columns < D, z - tl.sum(z, 1)[:, None] / D, 0.0)
        r = tl.where(row < tokens, 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / D + eps), 0.0)
        y = centred * r
        if sums is not None:
            weight_sum += grad * y
            bias_sum += grad
        if weight is not None:
            grad *= w
        grad = r * (grad - tl.sum(grad, 1)[:, None] / D - y * (tl.sum(grad * y, 1)[:, None] / D))
        if context is not None:
            tl.store(context_grad + b * F * D + place, grad, mask=others)
        if total_grad is not None:
            grad += tl.load(total_grad + b * grad_stride + offsets, mask=own, other=0.0).to(tl.float32)
        tl.store(tokens_grad + b * N * D + offsets, grad, mask=own)
        if update_grad is not None:
            tl.store(update_grad + b * N * D + offsets, grad, mask=own)
    if sums is not None:
        sums += tl.program_id(0) * 2 * D + tl.arange(0, BLOCK_D)
        tl.store(sums, tl.sum(weight_sum, 0), mask=tl.arange(0, BLOCK_D) < D)
        tl.store(sums + D, tl.sum(bias_sum, 0), mask=tl.arange(0, BLOCK_D) < D)


def forward(tokens, update, context, weight, bias, eps, dtype):
    """Tokens and update (B, N, D), context (B, F, D), weight and bias (D,), of which all but the tokens may
    be None -> [norm (B, F + N, D) of this dtype], with an update also total (B, N, D).
    """
    read, strides = in_rows(tokens, update, context)
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    (B, N, D), F = tokens.shape, 0 if context is None else context.shape[1]
    norm, total = tokens.new_empty((B, F + N, D), dtype=dtype), None
    if update is not None:
        total = tokens.new_empty((B, N, D), dtype=torch.promote_types(tokens.dtype, update.dtype))
    with on_device_of(tokens):
        residual_norm_kernel[(B * (F + N),)](
            *read, *strides, weight, bias, total, norm, F, N, eps, D=D, **settings(D)
        )  # fmt: skip
    return [norm] if total is None else [norm, total]


def backward(norm_grad, total_grad, total, context, weight, eps, update_dtype, sums_needed, programs):
    """Gradients of norm, and of total or None -> [those of the tokens], then those of the update in this
    dtype unless it is None, those of the context where there is one, and if they are needed (programs, 2, D),
    whose sums are those of weight and bias.
    """
    read, strides = in_rows(norm_grad, total_grad, total, context)
    weight = None if weight is None else weight.contiguous()
    (B, N, D), F = total.shape, 0 if context is None else context.shape[1]
    tokens_grad, update_grad, context_grad, sums = total.new_empty(total.shape), None, None, None
    if update_dtype is not None:
        update_grad = total.new_empty(total.shape, dtype=update_dtype)
    if context is not None:
        context_grad = context.new_empty(context.shape)
    if sums_needed:
        sums = total.new_empty((programs, 2, D), dtype=torch.float32)
    with on_device_of(total):
        residual_norm_backward_kernel[(programs,)](
            *read, *strides, weight, tokens_grad, update_grad, context_grad, sums,
            F, N, B * (F + N), eps, D=D, **backward_settings(D),
        )  # fmt: skip
    return [x for x in (tokens_grad, update_grad, context_grad, sums) if x is not None]


def in_rows(*tensors):
    """Tensors (B, N, D) or None, in which the tokens of a clip follow one another, as they do where a tensor
    is a part of the tokens; and the strides of their clips.
    """
    tensors = [x if x is None or x[:1].is_contiguous() else x.contiguous() for x in tensors]
    return tensors, [0 if x is None else x.stride(0) for x in tensors]


def settings(D):
    """Launch options: 8 elements for a thread, which 16-bit types load at once."""
    block = triton.next_power_of_2(D)
    return dict(BLOCK_D=block, num_warps=max(1, min(8, block // 256)))


def backward_settings(D):
    """16 elements for a thread, as it holds several tensors."""
    block = triton.next_power_of_2(D)
    tokens = max(1, TILE // block)
    return dict(BLOCK_D=block, BLOCK_N=tokens, num_warps=max(1, min(8, tokens * block // 512)))
