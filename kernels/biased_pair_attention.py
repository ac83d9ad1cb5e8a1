"""Pair attention with a bias b_ij of each pair, -inf where a pair is masked: one softmax over all pairs.

    P_ij = softmax_ij(c q.k_i + c q.k_j + b_ij)      p_i = sum_j P_ij,  r_j = sum_i P_ij,  c = scale
    o    = sum_i p_i v_i + sum_j r_j v_j             g_i = do.v_i - sum_i p_i do.v_i,  g_j likewise
    dv_i = sum_q p_i do                              dx_ij = P_ij (g_i + g_j)
    dk_i = c sum_q (sum_j dx_ij) q                   dq = c (sum_ij dx_ij k_i + sum_ij dx_ij k_j)
    db_ij = sum_q dx_ij, also over all that the bias is broadcast along;  j is treated like i

Values are additive, so only marginals are needed, and in a tile of pairs they are two matrix products: with
s_i = c q.k_i, t_j = c q.k_j, u = exp(s - max s), w = exp(t - max t) and E = exp(b - max b), they are u (E w)
and w (E' u), times exp(max s + max t + max b). The products underflow where b removes the pairs that hold the
maxima. Each pair loses less than 2**-126 of the largest such bound of a tile, so that a sum of weights of at
least SAFE = 2**-76 of it is right to float32. A program that ends with a query below SAFE starts again with
EXACT tiles: exponentials of all logits, (BLOCK_N, BLOCK_N, BLOCK_F), relative to the largest. So the result
is exact for any finite logits and any pattern of -inf.

A modality whose tokens are all masked stands as one token with key, value and bias 0.
"""

import torch
import triton
import triton.language as tl

from .cards import own_settings
from .tiles import (
    add_slots,
    broadcast_strides,
    empty_slots,
    finite,
    head,
    load_mask,
    load_rows,
    logits_of,
    modality,
    on_device_of,
    padded,
    precision_of,
    prepared,
    reciprocal,
    rows_of,
    shared_range,
    slot_head,
    store_rows,
)

SAFE = tl.constexpr(2.0**-76)
TOKENS, ALIVE = tl.constexpr(5), tl.constexpr(6)  # of what `side` returns


@triton.jit
def forward_kernel(
    query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias,
    output,
    query_strides, image_key_strides, image_value_strides, audio_key_strides, audio_value_strides,
    image_mask_stride, audio_mask_stride, bias_strides,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip.
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    image = side(
        image_key, image_value, image_mask, image_key_strides, image_value_strides, image_mask_stride, b, h, I
    )
    audio = side(
        audio_key, audio_value, audio_mask, audio_key_strides, audio_value_strides, audio_mask_stride, b, h, A
    )
    bias = (head(pair_bias, bias_strides, b, h), bias_strides[2], bias_strides[3])
    q = load_rows(head(query, query_strides, b, h), query_strides[2], queries, queries < F, K)

    out, safe = attend(q, image, audio, bias, scale, K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, False)
    if not safe:
        out, safe = attend(
            q, image, audio, bias, scale, K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, True
        )
    store_rows(slot_head(output, 0, 1, b, h, H, F, V), H * V, queries, queries < F, tl.trans(out), V)


@triton.jit
def attend(
    q, image, audio, bias, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Output (V, BLOCK_F), and whether it is exact."""
    top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    image_total, audio_total = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    image_out, audio_out = (
        tl.zeros((padded(V), BLOCK_F), tl.float32),
        tl.zeros((padded(V), BLOCK_F), tl.float32),
    )
    for i in range(0, image[TOKENS], BLOCK_N):
        image_logits, image_k, image_v = load_logits(q, image, i, scale, K, V, PRECISION, BLOCK_N)
        for j in range(0, audio[TOKENS], BLOCK_N):
            audio_logits, audio_k, audio_v = load_logits(q, audio, j, scale, K, V, PRECISION, BLOCK_N)
            tile = load_bias(bias, image, audio, i, j, BLOCK_N)
            previous = top
            image_weights, audio_weights, top = marginals(
                image_logits, audio_logits, tile, top, PAIR_PRECISION, EXACT
            )
            rescale = tl.exp(previous - finite(top))
            image_total = image_total * rescale + tl.sum(image_weights, 0)
            audio_total = audio_total * rescale + tl.sum(audio_weights, 0)
            image_out *= rescale
            audio_out *= rescale
            image_out += tl.dot(
                tl.trans(image_v).to(tl.float32), image_weights, input_precision=PAIR_PRECISION
            )
            audio_out += tl.dot(
                tl.trans(audio_v).to(tl.float32), audio_weights, input_precision=PAIR_PRECISION
            )
    out = image_out * reciprocal(image_total) + audio_out * reciprocal(audio_total)
    return out, is_safe(top, image_total, audio_total)


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit
def backward_kernel(
    query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, output_grad,
    query_grad, image_key_grad, image_value_grad, audio_key_grad, audio_value_grad, statistics,
    query_strides, image_key_strides, image_value_strides, audio_key_strides, audio_value_strides,
    image_mask_stride, audio_mask_stride, bias_strides, output_grad_strides,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip. It walks the pairs three times: for the
    # statistics of the softmax, by image tokens and by audio tokens.
    b, h, part, parts = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1), tl.num_programs(1)
    queries = part * BLOCK_F + tl.arange(0, BLOCK_F)
    image = side(
        image_key, image_value, image_mask, image_key_strides, image_value_strides, image_mask_stride, b, h, I
    )
    audio = side(
        audio_key, audio_value, audio_mask, audio_key_strides, audio_value_strides, audio_mask_stride, b, h, A
    )
    bias = (head(pair_bias, bias_strides, b, h), bias_strides[2], bias_strides[3])
    q = load_rows(head(query, query_strides, b, h), query_strides[2], queries, queries < F, K)
    do = load_rows(
        head(output_grad, output_grad_strides, b, h), output_grad_strides[2], queries, queries < F, V
    )
    image_grads = (
        slot_head(image_key_grad, part, parts, b, h, H, I, K),
        slot_head(image_value_grad, part, parts, b, h, H, I, V), H,
    )  # fmt: skip
    audio_grads = (
        slot_head(audio_key_grad, part, parts, b, h, H, A, K),
        slot_head(audio_value_grad, part, parts, b, h, H, A, V), H,
    )  # fmt: skip

    stats, safe = survey(
        q, do, image, audio, bias, scale, K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, False
    )
    if safe:
        dq = differentiate(
            q, do, image, audio, bias, stats, image_grads, audio_grads, scale,
            K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, False,
        )  # fmt: skip
    else:
        stats, _ = survey(
            q, do, image, audio, bias, scale, K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, True
        )
        dq = differentiate(
            q, do, image, audio, bias, stats, image_grads, audio_grads, scale,
            K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, True,
        )  # fmt: skip
    store_rows(
        slot_head(query_grad, 0, 1, b, h, H, F, K), H * K, queries, queries < F, tl.trans(dq * scale), K
    )
    if statistics is not None:  # for bias_kernel
        statistics = statistics + ((b.to(tl.int64) * 6 * H + h) * F + queries)
        for n in tl.static_range(5):
            tl.store(statistics + n * H * F, stats[n], mask=queries < F)
        tl.store(
            statistics + 5 * H * F,
            tl.where(safe, 1.0, 0.0) + tl.zeros((BLOCK_F,), tl.float32),
            mask=queries < F,
        )


@triton.jit
def survey(
    q, do, image, audio, bias, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Largest logit (or its bound), 1 / sum of weights and mean of do.v by the marginal of each modality, and
    whether this is exact.
    """
    top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    image_total, audio_total = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    image_mean, audio_mean = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, image[TOKENS], BLOCK_N):
        image_logits, image_k, image_v = load_logits(q, image, i, scale, K, V, PRECISION, BLOCK_N)
        image_grad = tl.dot(image_v, tl.trans(do), input_precision=PRECISION)
        for j in range(0, audio[TOKENS], BLOCK_N):
            audio_logits, audio_k, audio_v = load_logits(q, audio, j, scale, K, V, PRECISION, BLOCK_N)
            audio_grad = tl.dot(audio_v, tl.trans(do), input_precision=PRECISION)
            tile = load_bias(bias, image, audio, i, j, BLOCK_N)
            previous = top
            image_weights, audio_weights, top = marginals(
                image_logits, audio_logits, tile, top, PAIR_PRECISION, EXACT
            )
            rescale = tl.exp(previous - finite(top))
            image_total = image_total * rescale + tl.sum(image_weights, 0)
            audio_total = audio_total * rescale + tl.sum(audio_weights, 0)
            image_mean = image_mean * rescale + tl.sum(image_weights * image_grad, 0)
            audio_mean = audio_mean * rescale + tl.sum(audio_weights * audio_grad, 0)
    safe = is_safe(top, image_total, audio_total)
    image_inverse, audio_inverse = reciprocal(image_total), reciprocal(audio_total)
    return (top, image_inverse, audio_inverse, image_mean * image_inverse, audio_mean * audio_inverse), safe


@triton.jit
def differentiate(
    q, do, image, audio, bias, stats, image_grads, audio_grads, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of keys and values; returns that of the queries / scale, (K, BLOCK_F)."""
    top, image_inverse, audio_inverse, image_mean, audio_mean = stats
    transposed = (bias[0], bias[2], bias[1])
    dq = differentiate_side(
        q, do, image, audio, bias, top, image_inverse, image_mean, audio_mean, image_grads, scale,
        K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, EXACT,
    )  # fmt: skip
    dq += differentiate_side(
        q, do, audio, image, transposed, top, audio_inverse, audio_mean, image_mean, audio_grads, scale,
        K, V, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, EXACT,
    )  # fmt: skip
    return dq


@triton.jit
def differentiate_side(
    q, do, own, other, bias, top, inverse, own_mean, other_mean, grads, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of keys and values of one modality; returns its part of that of the queries."""
    dq = tl.zeros((padded(K), BLOCK_F), tl.float32)
    for i in range(0, own[TOKENS], BLOCK_N):
        logits, k, v = load_logits(q, own, i, scale, K, V, PRECISION, BLOCK_N)
        own_grad = tl.dot(v, tl.trans(do), input_precision=PRECISION) - own_mean
        weights = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)  # p_i
        others = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)  # sum_j P_ij g_j
        for j in range(0, other[TOKENS], BLOCK_N):
            other_logits, other_k, other_v = load_logits(q, other, j, scale, K, V, PRECISION, BLOCK_N)
            other_grad = tl.dot(other_v, tl.trans(do), input_precision=PRECISION) - other_mean
            tile = load_bias(bias, own, other, i, j, BLOCK_N)
            more_weights, more_others = weighted_by_other(
                logits, other_logits, other_grad, tile, top, PAIR_PRECISION, EXACT
            )
            weights += more_weights
            others += more_others
        weights *= inverse
        logits_grad = weights * own_grad + others * inverse
        tokens = i + tl.arange(0, BLOCK_N)
        inside, alive = tokens < own[TOKENS], own[ALIVE]
        dk = tl.dot(logits_grad, q.to(tl.float32), input_precision=PAIR_PRECISION) * scale
        dv = tl.dot(weights, do.to(tl.float32), input_precision=PAIR_PRECISION)
        dq += tl.dot(tl.trans(k).to(tl.float32), logits_grad, input_precision=PAIR_PRECISION)
        store_rows(grads[0], grads[2] * K, tokens, inside, tl.where(alive, dk, 0.0), K)
        store_rows(grads[1], grads[2] * V, tokens, inside, tl.where(alive, dv, 0.0), V)
    return dq


@triton.jit
def bias_kernel(
    query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, output_grad,
    statistics, bias_grad,
    query_strides, image_key_strides, image_value_strides, audio_key_strides, audio_value_strides,
    image_mask_stride, audio_mask_stride, bias_strides, output_grad_strides, bias_sizes,
    B, H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of the bias, and walks all clips, heads and queries that share it.
    tiles = tl.cdiv(I, BLOCK_N)
    tiles_of_head = tiles * tl.cdiv(A, BLOCK_N)
    matrix, own_tile = tl.program_id(0) // tiles_of_head, tl.program_id(0) % tiles_of_head
    first_b, last_b = shared_range(matrix // bias_sizes[1], bias_sizes[0], B)
    first_h, last_h = shared_range(matrix % bias_sizes[1], bias_sizes[1], H)
    i, j = own_tile % tiles * BLOCK_N, own_tile // tiles * BLOCK_N
    grad = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for b in range(first_b, last_b):
        for h in range(first_h, last_h):
            image = side(
                image_key, image_value, image_mask, image_key_strides, image_value_strides, image_mask_stride,
                b, h, I,
            )  # fmt: skip
            audio = side(
                audio_key, audio_value, audio_mask, audio_key_strides, audio_value_strides, audio_mask_stride,
                b, h, A,
            )  # fmt: skip
            bias = (head(pair_bias, bias_strides, b, h), bias_strides[2], bias_strides[3])
            for first_query in range(0, F, BLOCK_F):
                queries = first_query + tl.arange(0, BLOCK_F)
                q = load_rows(head(query, query_strides, b, h), query_strides[2], queries, queries < F, K)
                do = load_rows(
                    head(output_grad, output_grad_strides, b, h),
                    output_grad_strides[2],
                    queries,
                    queries < F,
                    V,
                )
                top, inverse, image_mean, audio_mean, safe = load_statistics(statistics, b, h, H, queries, F)
                image_logits, image_k, image_v = load_logits(q, image, i, scale, K, V, PRECISION, BLOCK_N)
                image_grad = tl.dot(image_v, tl.trans(do), input_precision=PRECISION) - image_mean
                audio_logits, audio_k, audio_v = load_logits(q, audio, j, scale, K, V, PRECISION, BLOCK_N)
                audio_grad = tl.dot(audio_v, tl.trans(do), input_precision=PRECISION) - audio_mean
                tile = load_bias(bias, image, audio, i, j, BLOCK_N)
                if safe and PRECISION != "ieee":  # whose products take too many registers
                    more = pair_grads(
                        image_logits, audio_logits, image_grad, audio_grad, tile, top, inverse,
                        PAIR_PRECISION, False,
                    )  # fmt: skip
                else:
                    more = pair_grads(
                        image_logits, audio_logits, image_grad, audio_grad, tile, top, inverse,
                        PAIR_PRECISION, True,
                    )  # fmt: skip
                grad += tl.where(image[ALIVE] & audio[ALIVE], more, 0.0)
    rows, columns = i + tl.arange(0, BLOCK_N), j + tl.arange(0, BLOCK_N)
    bias_grad += (matrix.to(tl.int64) * I + rows[:, None]) * A + columns[None, :]
    tl.store(bias_grad, grad, mask=(rows < I)[:, None] & (columns < A)[None, :])


@triton.jit
def load_statistics(statistics, b, h, H, queries, F):
    statistics = statistics + ((tl.cast(b, tl.int64) * 6 * H + h) * F + queries)
    inside = queries < F
    top = tl.load(statistics, mask=inside, other=float("inf"))  # what is not there weighs nothing
    inverse = tl.load(statistics + H * F, mask=inside, other=0.0)
    image_mean = tl.load(statistics + 3 * H * F, mask=inside, other=0.0)
    audio_mean = tl.load(statistics + 4 * H * F, mask=inside, other=0.0)
    safe = tl.min(tl.load(statistics + 5 * H * F, mask=inside, other=1.0), 0) > 0.0
    return top, inverse, image_mean, audio_mean, safe


# --- tiles of pairs -----------------------------------------------------------------------------------------


@triton.jit
def marginals(s, t, bias, top, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """Sums over j and over i of exp(s_i + t_j + b_ij - top), (BLOCK, BLOCK_F) each, and the new top."""
    if EXACT:
        logits = s[:, None, :] + t[None, :, :] + bias[:, :, None]
        top = tl.maximum(top, tl.max(tl.max(logits, 0), 0))
        weights = tl.exp(logits - finite(top))
        image_weights, audio_weights = tl.sum(weights, 1), tl.sum(weights, 0)
    else:
        u, w, E, limit = factors(s, t, bias)
        top = tl.maximum(top, limit)
        u *= tl.exp(limit - finite(top))
        image_weights = u * tl.dot(E, w, input_precision=PRECISION)
        audio_weights = w * tl.dot(tl.trans(E), u, input_precision=PRECISION)
    return image_weights, audio_weights, top


@triton.jit
def weighted_by_other(s, t, other, bias, top, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """Sums over j of exp(s_i + t_j + b_ij - top), alone and times other_j, (BLOCK, BLOCK_F) each."""
    if EXACT:
        weights = tl.exp(s[:, None, :] + t[None, :, :] + bias[:, :, None] - finite(top))
        own, others = tl.sum(weights, 1), tl.sum(weights * other[None, :, :], 1)
    else:
        u, w, E, limit = factors(s, t, bias)
        u *= tl.exp(limit - finite(top))
        own = u * tl.dot(E, w, input_precision=PRECISION)
        others = u * tl.dot(E, w * other, input_precision=PRECISION)
    return own, others


@triton.jit
def pair_grads(s, t, image, audio, bias, top, inverse, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """Sums over queries of P_ij (image_i + audio_j), (BLOCK, BLOCK)."""
    if EXACT:
        weights = tl.exp(s[:, None, :] + t[None, :, :] + bias[:, :, None] - finite(top)) * inverse
        grads = tl.sum(weights * (image[:, None, :] + audio[None, :, :]), 2)
    else:
        u, w, E, limit = factors(s, t, bias)
        u *= tl.exp(limit - finite(top)) * inverse
        grads = tl.dot(u * image, tl.trans(w), input_precision=PRECISION)
        grads += tl.dot(u, tl.trans(w * audio), input_precision=PRECISION)
        grads *= E
    return grads


@triton.jit
def factors(s, t, bias):
    """u_i, w_j and E_ij, at most 1 each, and limit with exp(s_i + t_j + b_ij) = u_i w_j E_ij exp(limit)."""
    attended = (tl.max(s, 1) > float("-inf"))[:, None] & (tl.max(t, 1) > float("-inf"))[None, :]
    bias = tl.where(attended, bias, float("-inf"))
    top_s, top_t, top_bias = tl.max(s, 0), tl.max(t, 0), tl.max(tl.max(bias, 0), 0)
    u, w, E = tl.exp(s - finite(top_s)), tl.exp(t - finite(top_t)), tl.exp(bias - finite(top_bias))
    return u, w, E, top_s + top_t + top_bias


@triton.jit
def is_safe(top, image_total, audio_total):
    """Whether what underflowed is below the precision of float32, for all queries."""
    safe = (top == float("-inf")) | ((image_total >= SAFE) & (audio_total >= SAFE))
    return tl.min(tl.where(safe, 1, 0), 0) == 1


@triton.jit
def side(key, value, mask, key_strides, value_strides, mask_stride, b, h, N):
    """What `modality` tells, and whether any token is attended."""
    key, value, mask, key_stride, value_stride, N = modality(
        key, value, mask, key_strides, value_strides, mask_stride, b, h, N
    )
    alive = N > 0
    if mask.dtype.is_ptr():
        attended = 0
        for start in range(0, N, 128):
            attended += tl.max(load_mask(mask, start + tl.arange(0, 128), N).to(tl.int32), 0)
        alive = attended > 0
    return key, value, mask, key_stride, value_stride, N, alive


@triton.jit
def load_logits(
    q, side, start, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK_N, BLOCK_F), keys and values of a tile of tokens; a dead modality has one, all 0."""
    key, value, mask, key_stride, value_stride, N, alive = side
    tokens = start + tl.arange(0, BLOCK_N)
    attended = load_mask(mask, tokens, N)
    k = load_rows(key, key_stride, tokens, attended, K)
    v = load_rows(value, value_stride, tokens, attended, V)
    stands_in = (tokens == 0) & (alive == 0)
    return logits_of(q, k, attended | stands_in, scale, PRECISION), k, v


@triton.jit
def load_bias(bias, own, other, i, j, BLOCK_N: tl.constexpr):
    """A tile of the bias in float32; 0 where a modality is dead."""
    pointer, row_stride, column_stride = bias
    rows, columns = i + tl.arange(0, BLOCK_N), j + tl.arange(0, BLOCK_N)
    present = tl.where(own[ALIVE] & other[ALIVE], own[TOKENS], 0)
    inside = (rows < present)[:, None] & (columns < other[TOKENS])[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


# --- the host's side ----------------------------------------------------------------------------------------


def forward(query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, scale):
    """As `forward` of pair_attention.py, with pair_bias (B or 1, H or 1, I, A)."""
    tensors = query, image_key, image_value, audio_key, audio_value
    inputs, (B, H, F, I, A, K, V), strides = prepared(tensors, (image_mask, audio_mask))
    options = settings(query.dtype, K, V, device=query.device)
    output = query.new_empty((B, F, H, V))
    with on_device_of(query):
        forward_kernel[B * H, triton.cdiv(F, options["BLOCK_F"])](
            *inputs, pair_bias, output, *strides, broadcast_strides(pair_bias), H, F, I, A, scale, **options,
        )  # fmt: skip
    return output.transpose(1, 2)


def backward(
    output_grad, query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask,
    pair_bias, scale, bias_grad,
):  # fmt: skip
    """Gradients of query, image_key, image_value, audio_key, audio_value; pair_bias if `bias_grad`."""
    tensors = query, image_key, image_value, audio_key, audio_value
    inputs, (B, H, F, I, A, K, V), strides = prepared(tensors, (image_mask, audio_mask))
    output_grad = rows_of(output_grad)
    options = settings(query.dtype, K, V, backward=True, device=query.device)
    parts = triton.cdiv(F, options["BLOCK_F"])
    grads = [empty_slots(query, 1), *(empty_slots(tensor, parts) for tensor in tensors[1:])]
    statistics = query.new_empty((B, 6, H, F), dtype=torch.float32) if bias_grad else None
    strides += [broadcast_strides(pair_bias), output_grad.stride()]
    with on_device_of(query):
        backward_kernel[B * H, parts](
            *inputs, pair_bias, output_grad, *grads, statistics, *strides,
            H, F, I, A, scale, **options,
        )  # fmt: skip
        results = [add_slots(grad, query.dtype) for grad in grads]
        if bias_grad:
            sizes, block = tuple(pair_bias.shape), options["BLOCK_N"]
            results.append(pair_bias.new_empty(sizes))
            tiles = triton.cdiv(sizes[2], block) * triton.cdiv(sizes[3], block)
            bias_kernel[sizes[0] * sizes[1] * tiles,](  # all in one dimension: the others end at 65535
                *inputs, pair_bias, output_grad, statistics, results[-1], *strides, sizes,
                B, H, F, I, A, scale, **options,
            )  # fmt: skip
        return results


def settings(dtype, K, V, *, backward=False, device=None):
    """As `settings` of pair_attention.py."""
    precision, single = precision_of(dtype), dtype == torch.float32
    few_warps = 2 if backward else 1  # whose tiles need no exchange through shared memory
    return dict(
        K=K,
        V=V,
        PRECISION=precision,
        PAIR_PRECISION=precision if single else "tf32",  # float16 has too few exponents
        BLOCK_F=16,
        BLOCK_N=16,
        num_warps=8 if single else few_warps if max(K, V) <= 32 else 4,
        num_stages=1,
        enable_fp_fusion=True,
        maxnreg=255,
    ) | own_settings(device, "biased_pair_attention", backward, dtype, 16, max(K, V))
