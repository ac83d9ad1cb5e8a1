"""Pairs whose attention does not factorize, streamed over chunks of tokens: no tensor of all pairs is stored.

`stream_marginals` is for a pair bias where marginals.py cannot use products of exponentials,
`BilinearPairAttention` for attention over products of tokens. Shapes as in `pair_attention`; both work in the
dtype they are given.
"""

import math

import torch

from ..checks import is_exporting
from .operators import once_differentiable

CHUNK = 2**22  # elements of the largest temporary (16 MiB in float32), if one token's row of pairs fits in it


def stream_marginals(image_logits, audio_logits, pair_bias):
    """Marginals of P_ij = softmax_ij(s_i + t_j + b_ij), (B, H, F, I) and (B, H, F, A).

    Exponents are relative to the largest logit of a pair, so the result is exact for any finite logits.
    """
    rows, columns, _, total = _sums_of_exponentials(image_logits, audio_logits, pair_bias)
    return rows / total, columns / total


def stream_marginals_backward(image_grad, audio_grad, image_logits, audio_logits, pair_bias, bias_grad):
    """Gradients of the logits, and of the bias if `bias_grad`.

    The gradient of additive values is additive, dP_ij = g_i + h_j, so that no value-wide product over pairs
    is needed: dlogit_ij = P_ij (g_i + h_j - delta) with delta = sum_i p_i g_i + sum_j r_j h_j.
    """
    rows, columns, largest, total = _sums_of_exponentials(image_logits, audio_logits, pair_bias)
    delta = ((rows * image_grad).sum(-1, keepdim=True) + (columns * audio_grad).sum(-1, keepdim=True)) / total
    grads = [torch.empty_like(rows), torch.zeros_like(columns)]
    if bias_grad:
        grads.append(rows.new_zeros(pair_bias.shape))
    for i in chunks_of(image_logits.shape[-1], audio_logits.numel()):
        logits = _biased_logits(image_logits, audio_logits, pair_bias, i)
        weights = (logits - largest[..., None]).exp_().div_(total[..., None])
        weights_grad = image_grad[..., i, None] + audio_grad[..., None, :]
        grad = weights_grad.sub_(delta[..., None]).mul_(weights)
        grads[0][..., i] = grad.sum(-1)
        grads[1] += grad.sum(-2)
        if bias_grad:
            _add_reduced(grads[2], i, grad.sum(2))
    return [*grads[:2], grads[2].to(pair_bias.dtype)] if bias_grad else grads


def _sums_of_exponentials(image_logits, audio_logits, pair_bias):
    """Of exp(logit - largest) over audio tokens and over image tokens, the largest, and the sum of all."""
    chunks = chunks_of(image_logits.shape[-1], audio_logits.numel())
    largest = torch.full_like(audio_logits[..., :1], -math.inf)  # (B, H, F, 1)
    for i in chunks:
        logits = _biased_logits(image_logits, audio_logits, pair_bias, i)  # (B, H, F, chunk, A)
        largest = torch.maximum(largest, logits.amax((-2, -1))[..., None])
    largest = finite(largest)

    rows, columns = image_logits.new_empty(image_logits.shape), audio_logits.new_zeros(audio_logits.shape)
    for i in chunks:
        logits = _biased_logits(image_logits, audio_logits, pair_bias, i)
        weights = (logits - largest[..., None]).exp_()
        rows[..., i] = weights.sum(-1)
        columns += weights.sum(-2)
    return rows, columns, largest, _total(rows.sum(-1, keepdim=True))


def _biased_logits(image_logits, audio_logits, pair_bias, i):
    logits = image_logits[..., i, None] + audio_logits[..., None, :]  # (B, H, F, chunk, A)
    return logits + bias_rows(pair_bias, i).to(logits.dtype)[:, :, None]


class BilinearPairAttention(torch.autograd.Function):
    """softmax_ij(q.(k_i * k_j) + b_ij) over values v_i * v_j, streamed over the tokens i of the short side.

    For one i, the rows q * k_i attend to the long side like F ordinary queries; the chunks of i are merged by
    an online softmax. The backward recomputes each chunk's weights twice: once for
    delta = sum_ij P_ij dP_ij, once for dlogit_ij = P_ij (dP_ij - delta).
    """

    @staticmethod
    def forward(ctx, query, short_key, short_value, short_mask, long_key, long_value, long_mask, pair_bias):
        inputs = (query, short_key, short_value, short_mask, long_key, long_value, long_mask, pair_bias)
        largest = query.new_full((*query.shape[:-1], 1), -math.inf)  # (B, H, F, 1)
        total = torch.zeros_like(largest)
        output = query.new_zeros(*query.shape[:-1], long_value.shape[-1])
        for i in chunks_of(short_key.shape[2], _bilinear_row(query, long_key, long_value)):
            logits, _ = _bilinear_logits(query, short_key, long_key, short_mask, long_mask, pair_bias, i)
            previous, largest = largest, torch.maximum(largest, logits.amax((-2, -1))[..., None])
            rescale = (previous - finite(largest)).exp()
            weights = (logits - finite(largest)[..., None]).exp_()  # (B, H, F, chunk, long)
            attended = _times_each(weights, long_value) * short_value[:, :, None, i]
            total = total * rescale + weights.sum((-2, -1))[..., None]
            output = output * rescale + attended.sum(3)
        total = _total(total)
        ctx.save_for_backward(*inputs, finite(largest)[..., None], total[..., None])
        return output / total

    @staticmethod
    @once_differentiable("pair_attention", "backend='reference'")
    def backward(ctx, output_grad):
        *inputs, pair_bias, largest, total = ctx.saved_tensors
        query, short_key, short_value, short_mask, long_key, long_value, long_mask = inputs
        query_grad, long_key_grad, long_value_grad = map(torch.zeros_like, (query, long_key, long_value))
        short_key_grad, short_value_grad = torch.empty_like(short_key), torch.empty_like(short_value)
        bias_grad = torch.zeros_like(pair_bias, dtype=query.dtype) if ctx.needs_input_grad[7] else None

        def recompute(i):
            logits, rows = _bilinear_logits(query, short_key, long_key, short_mask, long_mask, pair_bias, i)
            weights = (logits - largest).exp_().div_(total)
            attended_grad = output_grad[:, :, :, None] * short_value[:, :, None, i]  # (B, H, F, chunk, V)
            return rows, weights, attended_grad, _times_each(attended_grad, long_value.mT)

        chunks = chunks_of(short_key.shape[2], _bilinear_row(query, long_key, long_value))
        delta = torch.zeros_like(total)  # (B, H, F, 1, 1)
        for i in chunks:
            recomputed = recompute(i)
            _, weights, _, weights_grad = recomputed
            delta += (weights * weights_grad).sum((-2, -1), keepdim=True)
        for i in reversed(chunks):  # the last is recomputed already: a single chunk is computed once
            rows, weights, attended_grad, weights_grad = recomputed or recompute(i)
            recomputed = None
            short_value_grad[:, :, i] = (_times_each(weights, long_value) * output_grad[:, :, :, None]).sum(2)
            long_value_grad += weights.flatten(2, 3).mT @ attended_grad.flatten(2, 3)

            logits_grad = weights_grad.sub_(delta).mul_(weights)
            long_key_grad += logits_grad.flatten(2, 3).mT @ rows.flatten(2, 3)
            rows_grad = _times_each(logits_grad, long_key)  # (B, H, F, chunk, K)
            short_key_grad[:, :, i] = (rows_grad * query[:, :, :, None]).sum(2)
            query_grad += (rows_grad * short_key[:, :, None, i]).sum(3)
            if bias_grad is not None:
                _add_reduced(bias_grad, i, logits_grad.sum(2))
        if bias_grad is not None:
            bias_grad = bias_grad.to(pair_bias.dtype)
        short_grads, long_grads = (short_key_grad, short_value_grad), (long_key_grad, long_value_grad)
        return query_grad, *short_grads, None, *long_grads, None, bias_grad


def _bilinear_logits(query, short_key, long_key, short_mask, long_mask, pair_bias, i):
    """Logits (B, H, F, chunk, long) of the short-side tokens `i`, and the rows q * k_i they come from."""
    rows = query[:, :, :, None] * short_key[:, :, None, i]  # (B, H, F, chunk, K)
    logits = _times_each(rows, long_key.mT)
    if pair_bias is not None:
        logits = logits + bias_rows(pair_bias, i).to(logits.dtype)[:, :, None]
    if short_mask is not None:
        logits = logits.masked_fill(~short_mask[:, None, None, i, None], -math.inf)
    if long_mask is not None:
        logits = logits.masked_fill(~long_mask[:, None, None, None], -math.inf)
    return logits, rows


# --- chunks and sums ----------------------------------------------------------------------------------------


def finite(largest):
    """The largest of no logits is -inf; 0 in its place makes all weights exp(-inf - 0) = 0 instead of NaN."""
    return largest.masked_fill(largest == -math.inf, 0.0)


def _total(weights_sum):
    """Sums of exp(logit - largest) are at least exp(0) = 1, or 0 over nothing, which divides to 0."""
    return weights_sum.clamp(min=1.0)


def chunks_of(tokens, row):
    """Slices over `tokens` such that a temporary of `row` elements per token stays within CHUNK. An exported
    graph, which serves any batch size, has one.
    """
    if is_exporting():
        return [slice(None)]
    step = max(1, CHUNK // max(1, row))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _bilinear_row(query, long_key, long_value):
    B, H, queries, width = query.shape
    return B * H * queries * max(width, long_key.shape[2], long_value.shape[-1])


def _times_each(left, right):
    """(B, H, F, n, m) @ (B, H, m, k) -> (B, H, F, n, k) as one matrix product per batch entry and head."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def bias_rows(pair_bias, i):
    return pair_bias if pair_bias.shape[2] == 1 else pair_bias[:, :, i]


def _add_reduced(bias_grad, i, grad):
    """Adds a chunk's gradient (B, H, chunk, A) to that of a bias which may be broadcast in any dimension."""
    target = bias_rows(bias_grad, i)
    target += grad.sum_to_size(target.shape)
