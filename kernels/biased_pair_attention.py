"""Pair attention with a bias b_ij of each pair, -inf where a pair is masked: one softmax over all pairs.

    P_ij = softmax_ij(x_ij)                          x_ij = c q.k_i + c q.k_j + b_ij,  c = scale
                                                     p_i = sum_j P_ij,  r_j = sum_i P_ij
    o    = sum_i p_i v_i + sum_j r_j v_j             g_i = do.v_i - sum_i p_i do.v_i,  g_j likewise
    dv_i = sum_q p_i do                              dx_ij = P_ij (g_i + g_j)
    dk_i = c sum_q (sum_j dx_ij) q                   dq = c (sum_ij dx_ij k_i + sum_ij dx_ij k_j)
    db_ij = sum_q dx_ij, also over all that the bias is broadcast along;  j is treated like i

Values are additive, so only marginals are needed, and in a tile of pairs they are two matrix products: with
s_i = c q.k_i, t_j = c q.k_j, u = exp(s - max s), w = exp(t - max t) and E = exp(b - max b), they are u (E w)
and w (E' u), times exp(max s + max t + max b).

That exponent bounds the logits of its tile, and weights are relative to the largest bound of all tiles. Where
b removes the pairs that hold the maxima, the logits lie far below it and the products underflow. A pair then
loses less than 2**-126, and 2**27 of them 2**-99: one rounding (2**-23) of SAFE = 2**-76. So a sum of at
least SAFE is right. A program that ends with a query below SAFE starts again with EXACT tiles: exponentials
of all logits, one query after the other, relative to the largest logit. So the result is exact for any finite
logits and any pattern of -inf.

Few heads with many pairs are split by their tokens (SPLITS), as in pair_attention.py. A modality whose tokens
are all masked stands as one token with key, value and bias 0.
"""

import torch
import triton
import triton.language as tl

from .cards import own_settings
from .pair_attention import (
    COUNTS,
    PROGRAMS,
    empty_statistics,
    launch_backward,
    launch_forward,
    part,
    store_output,
)
from .tiles import (
    add_bias_slots,
    broadcast,
    empty_bias_slots,
    finite,
    head,
    load_mask,
    load_rows,
    logits_of,
    modality,
    on_device_of,
    own_shares,
    padded,
    pairs,
    precision_of,
    prepared,
    reciprocal,
    shared_range,
    slot_head,
    store_rows,
    weigh,
    with_strides,
)

SPLIT_PAIRS = 4 * 64**2  # the fewest pairs that are worth a program of their own
SAFE = tl.constexpr(2.0**-76)
MASK, TOKENS, ALIVE = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # of what `side` returns


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    query, image, audio, bias, output, statistics, partial,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and one of SPLITS parts of the image tokens.
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    image, audio, bias = side(image, b, h, I), side(audio, b, h, A), pairs(bias, b, h)
    q = load_rows(head(query, b, h), queries, queries < F, K)

    live = tl.minimum(F - tl.program_id(1) * BLOCK_F, BLOCK_F)  # queries that there are
    found, _ = attend_safely(
        q, None, live, image, audio, bias, split, scale,
        K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N,
    )  # fmt: skip
    top, image_sum, audio_sum, image_out, audio_out = found
    of_image, of_audio = (top, image_sum, image_out), (top, audio_sum, audio_out)
    store_output(output, statistics, partial, split, b, h, H, queries, F, of_image, of_audio, V, SPLITS)


@triton.jit
def attend_safely(
    q, do, live, image, audio, bias, split, scale,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `attend` finds, and whether it needed no exact tiles."""
    found = attend(
        q, do, live, image, audio, bias, split, scale,
        K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, False,
    )  # fmt: skip
    top, image_total, audio_total, _, _ = found
    right = (top == float("-inf")) | ((image_total >= SAFE) & (audio_total >= SAFE))
    safe = tl.min(tl.where(right, 1, 0), 0) == 1
    if not safe:
        found = attend(
            q, do, live, image, audio, bias, split, scale,
            K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, True,
        )  # fmt: skip
    return found, safe


@triton.jit
def attend(
    q, do, live, image, audio, bias, split, scale,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Largest logit (or its bound); and by the marginal of each modality, sum of weights (BLOCK_F,) and what
    `weighted` returns.
    """
    top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    image_total, audio_total = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    if do is None:
        image_out = tl.zeros((padded(V), BLOCK_F), tl.float32)
    else:
        image_out = tl.zeros((BLOCK_F,), tl.float32)
    audio_out = image_out
    first, last = part(image[TOKENS], split, SPLITS, BLOCK_N)
    for i in range(first, last, BLOCK_N):
        image_logits, image_k, image_v, image_attended = load_logits(
            q, image, i, scale, K, V, PRECISION, BLOCK_N
        )
        before = top
        image_weights = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for j in range(0, audio[TOKENS], BLOCK_N):
            audio_logits, audio_k, audio_v, audio_attended = load_logits(
                q, audio, j, scale, K, V, PRECISION, BLOCK_N
            )
            tile = load_bias(bias, image, audio, i, j, image_attended, audio_attended, BLOCK_N)
            previous = top
            more_weights, audio_weights, top = marginals(
                image_logits, audio_logits, tile, top, live, PAIR_PRECISION, BLOCK_F, BLOCK_N, EXACT
            )
            rescale = tl.exp(previous - finite(top))
            image_weights = image_weights * rescale + more_weights
            audio_total = audio_total * rescale + tl.sum(audio_weights, 0)
            audio_out = audio_out * rescale + weighted(audio_weights, audio_v, do, PRECISION, PAIR_PRECISION)
        rescale = tl.exp(before - finite(top))
        image_total = image_total * rescale + tl.sum(image_weights, 0)
        image_out = image_out * rescale + weighted(image_weights, image_v, do, PRECISION, PAIR_PRECISION)
    return top, image_total, audio_total, image_out, audio_out


@triton.jit
def weighted(weights, v, do, PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr):
    """Sums of weighted values (V, BLOCK_F); or, with the gradient do, of weighted do.v (BLOCK_F,)."""
    if do is None:
        return pair_dot(tl.trans(v), weights, PAIR_PRECISION)
    else:
        return tl.sum(weigh(weights, tl.dot(v, tl.trans(do), input_precision=PRECISION)), 0)


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    query, image, audio, output_grad, bias, statistics,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and one of SPLITS parts of the image tokens.
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    image, audio, bias = side(image, b, h, I), side(audio, b, h, A), pairs(bias, b, h)
    q = load_rows(head(query, b, h), queries, queries < F, K)
    do = load_rows(head(output_grad, b, h), queries, queries < F, V)
    live = tl.minimum(F - tl.program_id(1) * BLOCK_F, BLOCK_F)  # queries that there are
    found, safe = attend_safely(
        q, do, live, image, audio, bias, split, scale,
        K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N,
    )  # fmt: skip
    store_found(statistics, split, b, h, H, queries, F, found, safe, SPLITS)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    query, image, audio, output_grad, bias, statistics,
    query_grad, image_key_grad, image_value_grad, audio_key_grad, audio_value_grad,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and one of SPLITS parts of the tokens of each
    # modality. It walks their pairs by image tokens and by audio tokens; before, for the statistics of the
    # softmax, if it owns all.
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    queries = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    image, audio, bias = side(image, b, h, I), side(audio, b, h, A), pairs(bias, b, h)
    q = load_rows(head(query, b, h), queries, queries < F, K)
    do = load_rows(head(output_grad, b, h), queries, queries < F, V)
    image_grads = (
        slot_head(image_key_grad, tile, tiles, b, h, H, I, K),
        slot_head(image_value_grad, tile, tiles, b, h, H, I, V),
    )
    audio_grads = (
        slot_head(audio_key_grad, tile, tiles, b, h, H, A, K),
        slot_head(audio_value_grad, tile, tiles, b, h, H, A, V),
    )

    live = tl.minimum(F - tile * BLOCK_F, BLOCK_F)
    if SPLITS == 1:
        found, safe = attend_safely(
            q, do, live, image, audio, bias, split, scale,
            K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N,
        )  # fmt: skip
        if statistics is not None:  # for bias_kernel
            store_found(statistics, split, b, h, H, queries, F, found, safe, SPLITS)
        top, image_total, audio_total, image_mean, audio_mean = found
        image_inverse, audio_inverse = reciprocal(image_total), reciprocal(audio_total)
        image_mean, audio_mean = image_mean * image_inverse, audio_mean * audio_inverse
    else:
        top, image_inverse, audio_inverse, image_mean, audio_mean, safe = load_found(
            statistics, b, h, H, queries, F, SPLITS
        )
    stats = top, image_inverse, audio_inverse, image_mean, audio_mean
    if safe:
        dq = differentiate(
            q, do, live, image, audio, bias, stats, image_grads, audio_grads, split, scale,
            K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, False,
        )  # fmt: skip
    else:
        dq = differentiate(
            q, do, live, image, audio, bias, stats, image_grads, audio_grads, split, scale,
            K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, True,
        )  # fmt: skip
    store_rows(
        slot_head(query_grad, split, SPLITS, b, h, H, F, K), queries, queries < F, tl.trans(dq * scale), K
    )


@triton.jit
def differentiate(
    q, do, live, image, audio, bias, stats, image_grads, audio_grads, split, scale,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of keys and values; returns that of the queries / scale, (K, BLOCK_F)."""
    top, image_inverse, audio_inverse, image_mean, audio_mean = stats
    transposed = (bias[0], bias[2], bias[1])
    dq = differentiate_side(
        q, do, live, image, audio, bias, top, image_inverse, image_mean, audio_mean, image_grads, split,
        scale, K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, EXACT,
    )  # fmt: skip
    dq += differentiate_side(
        q, do, live, audio, image, transposed, top, audio_inverse, audio_mean, image_mean, audio_grads,
        split, scale, K, V, SPLITS, PRECISION, PAIR_PRECISION, BLOCK_F, BLOCK_N, EXACT,
    )  # fmt: skip
    return dq


@triton.jit
def differentiate_side(
    q, do, live, own, other, bias, top, inverse, own_mean, other_mean, grads, split, scale,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of keys and values of one modality; returns its part of that of the queries."""
    dq = tl.zeros((padded(K), BLOCK_F), tl.float32)
    first, last = part(own[TOKENS], split, SPLITS, BLOCK_N)
    for i in range(first, last, BLOCK_N):
        logits, k, v, attended = load_logits(q, own, i, scale, K, V, PRECISION, BLOCK_N)
        weights = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)  # p_i
        others = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)  # sum_j P_ij g_j
        for j in range(0, other[TOKENS], BLOCK_N):
            other_logits, other_k, other_v, other_attended = load_logits(
                q, other, j, scale, K, V, PRECISION, BLOCK_N
            )
            other_grad = tl.dot(other_v, tl.trans(do), input_precision=PRECISION) - other_mean
            tile = load_bias(bias, own, other, i, j, attended, other_attended, BLOCK_N)
            more_weights, more_others = weighted_by_other(
                logits, other_logits, other_grad, tile, top, live, PAIR_PRECISION, BLOCK_F, BLOCK_N, EXACT
            )
            weights += more_weights
            others += more_others
        own_grad = tl.dot(v, tl.trans(do), input_precision=PRECISION) - own_mean
        weights *= inverse
        logits_grad = weights * own_grad + others * inverse
        tokens = i + tl.arange(0, BLOCK_N)
        inside, alive = tokens < own[TOKENS], own[ALIVE]
        dk = pair_dot(logits_grad, q, PAIR_PRECISION) * scale
        dv = pair_dot(weights, do, PAIR_PRECISION)
        dq += pair_dot(tl.trans(k), logits_grad, PAIR_PRECISION)
        store_rows(grads[0], tokens, inside, tl.where(alive, dk, 0.0), K)
        store_rows(grads[1], tokens, inside, tl.where(alive, dv, 0.0), V)
    return dq


@triton.jit(do_not_specialize=[*COUNTS, "B"])
def bias_kernel(
    query, image, audio, output_grad, bias, statistics, bias_grad, bias_sizes,
    B, H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of the bias, and walks a part of the clips, heads and queries that share it,
    # over which products of u and w are added up before their sum is multiplied with E.
    tiles = tl.cdiv(I, BLOCK_N)
    tiles_of_matrix = tiles * tl.cdiv(A, BLOCK_N)
    matrix, own_tile = tl.program_id(0) // tiles_of_matrix, tl.program_id(0) % tiles_of_matrix
    i, j = own_tile % tiles * BLOCK_N, own_tile // tiles * BLOCK_N
    first_b, last_b = shared_range(matrix // bias_sizes[1], bias_sizes[0], B)
    first_h, last_h = shared_range(matrix % bias_sizes[1], bias_sizes[1], H)
    matrices = bias_sizes[0] * bias_sizes[1]
    heads, blocks = last_h - first_h, tl.cdiv(F, BLOCK_F)
    first, last = own_shares((last_b - first_b) * heads * blocks)
    tile = load_pairs(pairs(bias, first_b, first_h), i, j, I, A, float("-inf"), BLOCK_N)
    top_bias = tl.max(tl.max(tile, 0), 0)
    E = tl.exp(tile - finite(top_bias))
    products, sums = tl.zeros((BLOCK_N, BLOCK_N), tl.float32), tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for n in range(first, last):
        b, h = first_b + n // (heads * blocks), first_h + n // blocks % heads
        first_query = n % blocks * BLOCK_F
        queries = first_query + tl.arange(0, BLOCK_F)
        own_image, own_audio = side(image, b, h, I), side(audio, b, h, A)
        q = load_rows(head(query, b, h), queries, queries < F, K)
        do = load_rows(head(output_grad, b, h), queries, queries < F, V)
        top, inverse, _, image_mean, audio_mean, safe = load_found(statistics, b, h, H, queries, F, SPLITS)
        s, image_k, image_v, _ = load_logits(q, own_image, i, scale, K, V, PRECISION, BLOCK_N)
        t, audio_k, audio_v, _ = load_logits(q, own_audio, j, scale, K, V, PRECISION, BLOCK_N)
        image_grad = tl.dot(image_v, tl.trans(do), input_precision=PRECISION) - image_mean
        audio_grad = tl.dot(audio_v, tl.trans(do), input_precision=PRECISION) - audio_mean
        alive = own_image[ALIVE] & own_audio[ALIVE]
        top = tl.where(alive, top, float("inf"))  # a dead modality's pairs have no bias
        if safe:
            u, top_s = exponentials(s)
            w, top_t = exponentials(t)
            u *= tl.exp(top_s + top_t + top_bias - finite(top)) * inverse
            products += pair_dot(u * image_grad, tl.trans(w), PAIR_PRECISION)
            products += pair_dot(u, tl.trans(w * audio_grad), PAIR_PRECISION)
        else:
            live = tl.minimum(F - first_query, BLOCK_F)
            sums += exact_grads(s, t, image_grad, audio_grad, tile, top, inverse, live, BLOCK_F, BLOCK_N)
    rows, columns = i + tl.arange(0, BLOCK_N), j + tl.arange(0, BLOCK_N)
    rows_before = (tl.program_id(1) * matrices + matrix).to(tl.int64) * I
    bias_grad += (rows_before + rows[:, None]) * A + columns[None, :]
    tl.store(bias_grad, E * products + sums, mask=(rows < I)[:, None] & (columns < A)[None, :])


@triton.jit
def store_found(statistics, split, b, h, H, queries, F, found, safe, SPLITS: tl.constexpr):
    """Keeps what one split found about its queries in a tensor (B, quantity, SPLITS, F, H)."""
    statistics, stride = slot_head(statistics, split, 6 * SPLITS, b, h, H, F, 1)
    statistics, step = statistics + queries * stride, SPLITS * F * H
    for n in tl.static_range(5):
        tl.store(statistics + n * step, found[n], mask=queries < F)
    tl.store(statistics + 5 * step, tl.where(safe, 1.0, 0.0), mask=queries < F)


@triton.jit
def load_found(statistics, b, h, H, queries, F, SPLITS: tl.constexpr):
    """Merges the splits: largest logit (or its bound); by the marginal of each modality, 1 / sum of weights
    and mean of do.v, (BLOCK_F,) each; and whether none of them needed exact tiles.
    """
    statistics, stride = slot_head(statistics, 0, 6 * SPLITS, b, h, H, F, 1)
    splits = tl.arange(0, SPLITS)[:, None]
    pointers = statistics + splits * F * stride + queries[None, :] * stride  # (SPLITS, BLOCK_F)
    step, inside = SPLITS * F * H, (queries < F)[None, :]
    tops = tl.load(pointers, mask=inside, other=float("-inf"))
    top = finite(tl.max(tops, 0))
    rescale = tl.exp(tops - top[None, :])
    image_total = tl.sum(weigh(rescale, tl.load(pointers + step, mask=inside, other=0.0)), 0)
    audio_total = tl.sum(weigh(rescale, tl.load(pointers + 2 * step, mask=inside, other=0.0)), 0)
    image_sum = tl.sum(weigh(rescale, tl.load(pointers + 3 * step, mask=inside, other=0.0)), 0)
    audio_sum = tl.sum(weigh(rescale, tl.load(pointers + 4 * step, mask=inside, other=0.0)), 0)
    safe = tl.min(tl.min(tl.load(pointers + 5 * step, mask=inside, other=1.0), 0), 0) > 0.0
    top = tl.where(queries < F, top, float("inf"))  # what is not there weighs nothing
    image_inverse, audio_inverse = reciprocal(image_total), reciprocal(audio_total)
    return top, image_inverse, audio_inverse, image_sum * image_inverse, audio_sum * audio_inverse, safe


# --- tiles of pairs -----------------------------------------------------------------------------------------


@triton.jit
def marginals(
    s, t, bias, top, live,
    PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums over j and over i of exp(s_i + t_j + b_ij - top), (BLOCK_N, BLOCK_F) each, and the new top."""
    if EXACT:
        image_weights = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        audio_weights = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for query in range(live):
            own = tl.arange(0, BLOCK_F) == query
            logits = logits_of_query(s, t, bias[0], own)
            own_top = tl.maximum(of_query(top, own), tl.max(tl.max(logits, 0), 0))
            weights = tl.exp(logits - finite(own_top))
            image_weights = tl.where(own[None, :], tl.sum(weights, 1)[:, None], image_weights)
            audio_weights = tl.where(own[None, :], tl.sum(weights, 0)[:, None], audio_weights)
            top = tl.where(own, own_top, top)
    else:
        u, top_s = exponentials(s)
        w, top_t = exponentials(t)
        E, top_bias = tl.exp(bias[0] - finite(bias[1])), bias[1]
        limit = top_s + top_t + top_bias
        top = tl.maximum(top, limit)
        u *= tl.exp(limit - finite(top))
        image_weights = weigh(u, pair_dot(E, w, PAIR_PRECISION))
        audio_weights = weigh(w, pair_dot(tl.trans(E), u, PAIR_PRECISION))
    return image_weights, audio_weights, top


@triton.jit
def weighted_by_other(
    s, t, other, bias, top, live,
    PAIR_PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums over j of exp(s_i + t_j + b_ij - top), alone and times other_j, (BLOCK_N, BLOCK_F) each."""
    if EXACT:
        alone = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        others = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for query in range(live):
            own = tl.arange(0, BLOCK_F) == query
            weights = tl.exp(logits_of_query(s, t, bias[0], own) - finite(of_query(top, own)))
            alone = tl.where(own[None, :], tl.sum(weights, 1)[:, None], alone)
            own_others = tl.sum(weigh(weights, of_query(other, own)[None, :]), 1)
            others = tl.where(own[None, :], own_others[:, None], others)
    else:
        u, top_s = exponentials(s)
        w, top_t = exponentials(t)
        E, top_bias = tl.exp(bias[0] - finite(bias[1])), bias[1]
        u *= tl.exp(top_s + top_t + top_bias - finite(top))
        alone = u * pair_dot(E, w, PAIR_PRECISION)
        others = u * pair_dot(E, w * other, PAIR_PRECISION)
    return alone, others


@triton.jit
def exact_grads(
    s, t, image, audio, bias, top, inverse, live, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sums over queries of P_ij (image_i + audio_j), (BLOCK_N, BLOCK_N)."""
    sums = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for query in range(live):
        own = tl.arange(0, BLOCK_F) == query
        weights = tl.exp(logits_of_query(s, t, bias, own) - finite(of_query(top, own)))
        grads = of_query(image, own)[:, None] + of_query(audio, own)[None, :]
        sums += weights * of_query(inverse, own) * grads
    return sums


@triton.jit
def pair_dot(left, right, PAIR_PRECISION: tl.constexpr):
    """A product with weights, or with what they are made of."""
    if PAIR_PRECISION == "bf16":
        return tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16))
    else:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=PAIR_PRECISION)


@triton.jit
def exponentials(logits):
    """Of each query, relative to the largest (BLOCK_F,)."""
    top = tl.max(logits, 0)
    return tl.exp(logits - finite(top)), top


@triton.jit
def logits_of_query(s, t, bias, own):
    """(BLOCK_N, BLOCK_N)"""
    return of_query(s, own)[:, None] + of_query(t, own)[None, :] + bias


@triton.jit
def of_query(x, own):
    """What belongs to one query: (BLOCK_F,) -> a number, (BLOCK_N, BLOCK_F) -> (BLOCK_N,)."""
    if len(x.shape) == 1:
        return tl.sum(tl.where(own, x, 0.0), 0)
    else:
        return tl.sum(tl.where(own[None, :], x, 0.0), 1)


@triton.jit
def side(tensors, b, h, N):
    """What `modality` tells, and whether any token is attended."""
    key, value, mask, N = modality(tensors, b, h, N)
    alive = N > 0
    if mask.dtype.is_ptr():
        attended = 0
        for start in range(0, N, 128):
            attended += tl.max(load_mask(mask, start + tl.arange(0, 128), N).to(tl.int32), 0)
        alive = attended > 0
    return key, value, mask, N, alive


@triton.jit
def load_logits(
    q, side, start, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK_N, BLOCK_F), keys and values of a tile of tokens, and which may be attended to; a dead
    modality has one, all 0.
    """
    key, value, mask, N, alive = side
    tokens = start + tl.arange(0, BLOCK_N)
    attended = load_mask(mask, tokens, N)
    k = load_rows(key, tokens, attended, K)
    v = load_rows(value, tokens, attended, V)
    attended = attended | ((tokens == 0) & (alive == 0))
    return logits_of(q, k, attended, scale, PRECISION), k, v, attended


@triton.jit
def load_bias(bias, own, other, i, j, attended, other_attended, BLOCK_N: tl.constexpr):
    """A tile of the bias in float32, 0 where a modality is dead, -inf at masked tokens; and the largest of
    all, of masked tokens as well: what `bias_kernel` computes for all clips at once is relative to it.
    """
    alive = own[ALIVE] & other[ALIVE]
    tokens, otherwise = tl.where(alive, own[TOKENS], 0), tl.where(alive, float("-inf"), 0.0)
    tile = load_pairs(bias, i, j, tokens, other[TOKENS], otherwise, BLOCK_N)
    top = tl.max(tl.max(tile, 0), 0)
    if own[MASK].dtype.is_ptr() or other[MASK].dtype.is_ptr():
        tile = tl.where(attended[:, None] & other_attended[None, :], tile, float("-inf"))
    return tile, top


@triton.jit
def load_pairs(bias, i, j, I, A, otherwise, BLOCK_N: tl.constexpr):
    """A tile of the bias in float32; something else outside of it."""
    pointer, row_stride, column_stride = bias
    pointer += tl.cast(i, tl.int64) * row_stride + tl.cast(j, tl.int64) * column_stride
    own = tl.arange(0, BLOCK_N)
    offsets = own.to(tl.int64)[:, None] * row_stride + own.to(tl.int64)[None, :] * column_stride
    inside = (own < I - i)[:, None] & (own < A - j)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=otherwise).to(tl.float32)


# --- the host's side ----------------------------------------------------------------------------------------


def forward(query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, scale):
    """As `forward` of pair_attention.py, with pair_bias (B or 1, H or 1, I, A)."""
    inputs, sizes = prepared(query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask)
    options = settings(query.dtype, *sizes, device=query.device)
    return launch_forward(forward_kernel, (*inputs, broadcast(pair_bias)), query, sizes, scale, options)


def backward(
    output_grad, query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask,
    pair_bias, scale, bias_grad,
):  # fmt: skip
    """Gradients of query, image_key, image_value, audio_key, audio_value; pair_bias if `bias_grad`."""
    tensors = query, image_key, image_value, audio_key, audio_value
    inputs, sizes = prepared(*tensors, image_mask, audio_mask)
    options = settings(query.dtype, *sizes, backward=True, device=query.device)
    inputs = *inputs, with_strides(output_grad), broadcast(pair_bias)
    needed = options["SPLITS"] > 1 or bias_grad
    statistics = empty_statistics(query, options["SPLITS"]) if needed else None
    kernels = statistics_kernel, backward_kernel
    grads = launch_backward(*kernels, inputs, statistics, tensors, sizes, scale, options)
    if bias_grad:
        (B, H, F, I, A, *_), shape, block = sizes, tuple(pair_bias.shape), options["BLOCK_N"]
        tiles = triton.cdiv(I, block) * triton.cdiv(A, block)
        slots = empty_bias_slots(pair_bias, tiles, B * H * triton.cdiv(F, options["BLOCK_F"]))
        with on_device_of(query):
            bias_kernel[shape[0] * shape[1] * tiles, len(slots)](
                *inputs, statistics, slots, shape, B, H, F, I, A, scale, **options
            )
        grads.append(add_bias_slots(slots, pair_bias.dtype))
    return grads


def settings(dtype, B, H, F, I, A, K, V, *, backward=False, device=None):
    """As `settings` of pair_attention.py."""
    precision, one_warp = precision_of(dtype), max(K, V) <= (16 if dtype == torch.float32 else 64)
    splits, programs = 1, B * H * triton.cdiv(F, 16)
    while 2 * splits * programs <= PROGRAMS and 2 * splits * SPLIT_PAIRS <= I * A and 64 * splits <= I:
        splits *= 2
    return dict(
        K=K,
        V=V,
        SPLITS=splits,
        PRECISION=precision,
        # As the inputs, but that weights span more than the exponents of float16.
        PAIR_PRECISION={torch.float16: "tf32", torch.bfloat16: "bf16"}.get(dtype, precision),
        BLOCK_F=16,
        BLOCK_N=32 if one_warp or not backward else 16,
        num_warps=1 if one_warp else 8 if dtype == torch.float32 else 4,
        num_stages=1,
        enable_fp_fusion=True,
        maxnreg=255,
    ) | own_settings(device, "biased_pair_attention", backward, dtype, 16, max(K, V))
