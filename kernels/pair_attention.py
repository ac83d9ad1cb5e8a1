"""Pair attention without a pair term: two cross-attentions that share their queries, in one launch.

    o    = sum_i p_i v_i + sum_j r_j v_j         p = softmax_i(c q.k_i),  r = softmax_j(c q.k_j),  c = scale
    dv_i = sum_q p_i do                          ds_i = p_i (do.v_i - delta),  delta = sum_i p_i do.v_i
    dk_i = c sum_q ds_i q                        dq = c (sum_i ds_i k_i + sum_j ds_j k_j);  j is treated as i

Nothing is saved between the directions. The backward walks the tokens of each modality twice: first for the
softmax's largest logit, sum and delta, then for the gradients. Every walk computes logits by the same dot,
with tokens as rows and queries as columns; only loaded tiles are transposed. Logits and sums are float32.
(exp(x - max) and not exp2 of logits with a factor log2(e), whose rounding costs digits at large logits.)

Few heads with many tokens are split among programs (SPLITS of them), and so are more than BLOCK_F queries.
Each program then leaves partial results in a float32 slot of its own, and slots are added in order: there are
no atomics, and equal inputs give equal bits.
"""

import functools

import torch
import triton
import triton.language as tl

from .cards import own_settings
from .tiles import (
    add_slots,
    empty_slots,
    finite,
    head,
    load_rows,
    load_tokens,
    logits_of,
    modality,
    on_device_of,
    padded,
    precision_of,
    prepared,
    reciprocal,
    slot_head,
    store_rows,
    weigh,
    with_strides,
)

PROGRAMS = 256  # tokens are split until there are so many: 2 for each multiprocessor of an A100 or H100
SPLIT_TOKENS = 256  # the fewest tokens that are worth a program of their own
# Triton would compile anew where one of these is 1 or a multiple of 16; no load or store gains by it.
COUNTS = ["F", "I", "A"]
TOKENS = tl.constexpr(3)  # of what `modality` returns
BESIDE, GRADS_BESIDE = tl.constexpr(0), tl.constexpr(1)  # of what `of_blocks` returns


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    query, image, audio, image_blocks, audio_blocks, output, statistics, partial,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and reads one of SPLITS parts of its tokens.
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    image, audio = modality(image, b, h, I), modality(audio, b, h, A)
    image_blocks = of_blocks(image_blocks, b, h, H, queries, F)
    audio_blocks = of_blocks(audio_blocks, b, h, H, queries, F)

    q = load_rows(head(query, b, h), queries, queries < F, K)
    of_image = attend(q, None, image, image_blocks, split, scale, K, V, SPLITS, PRECISION, BLOCK_F, BLOCK_N)
    of_audio = attend(q, None, audio, audio_blocks, split, scale, K, V, SPLITS, PRECISION, BLOCK_F, BLOCK_N)
    store_output(output, statistics, partial, split, b, h, H, queries, F, of_image, of_audio, V, SPLITS)


@triton.jit
def store_output(
    output, statistics, partial, split, b, h, H, queries, F, of_image, of_audio,
    V: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Stores the output; or, where tokens are split, what `merge_kernel` makes it of. Of each modality are
    given largest logit, sum of weights (BLOCK_F,) and weighted values (V, BLOCK_F).
    """
    image_top, image_sum, image_out = of_image
    audio_top, audio_sum, audio_out = of_audio
    if SPLITS == 1:
        out = image_out * reciprocal(image_sum) + audio_out * reciprocal(audio_sum)
        store_rows(slot_head(output, 0, 1, b, h, H, F, V), queries, queries < F, tl.trans(out), V)
    else:
        store_statistics(statistics, 0, split, b, h, H, queries, F, image_top, image_sum, 0.0, SPLITS)
        store_statistics(statistics, 1, split, b, h, H, queries, F, audio_top, audio_sum, 0.0, SPLITS)
        image_partial = slot_head(partial, split, 2 * SPLITS, b, h, H, F, V)
        audio_partial = slot_head(partial, SPLITS + split, 2 * SPLITS, b, h, H, F, V)
        store_rows(image_partial, queries, queries < F, tl.trans(image_out), V)
        store_rows(audio_partial, queries, queries < F, tl.trans(audio_out), V)


@triton.jit
def attend(
    q, do, side, blocks, split, scale,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of weights (BLOCK_F,) and weighted values (V, BLOCK_F) of one modality; with the
    gradient do of the output, weights times do.v (BLOCK_F,) in place of the last.
    """
    top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    if do is None:
        weighted = tl.zeros((padded(V), BLOCK_F), tl.float32)
    else:
        weighted = tl.zeros((BLOCK_F,), tl.float32)
    first, last = part(side[TOKENS], split, SPLITS, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        k, v, attended = load_tokens(tokens, side, K, V)
        logits = logits_of(q, k, attended, scale, PRECISION)
        logits = plus_beside(logits, blocks, BESIDE, tokens, attended)
        if do is not None:
            weights_grad = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            weights_grad = plus_beside(weights_grad, blocks, GRADS_BESIDE, tokens, attended)
        previous, top = top, tl.maximum(top, tl.max(logits, 0))
        weights = tl.exp(logits - finite(top))
        rescale = tl.exp(previous - finite(top))
        total = total * rescale + tl.sum(weights, 0)
        if do is None:
            sums = tl.dot(tl.trans(v), weights.to(v.dtype), input_precision=PRECISION)
        else:
            sums = tl.sum(weigh(weights, weights_grad), 0)
        weighted = weighted * rescale + sums
    return top, total, weighted


@triton.jit(do_not_specialize=["F"])
def merge_kernel(
    statistics, partial, output, H, F,
    V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and adds what the programs of its splits left.
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    out = tl.zeros((BLOCK_F, padded(V)), tl.float32)
    for side in tl.static_range(2):
        top, inverse, _ = load_statistics(statistics, side, b, h, H, queries, F, SPLITS)
        for split in range(SPLITS):
            own_top, stride = slot_head(statistics, 3 * side * SPLITS + split, 6 * SPLITS, b, h, H, F, 1)
            own_top = tl.load(own_top + queries * stride, mask=queries < F, other=0.0)
            part_of = slot_head(partial, side * SPLITS + split, 2 * SPLITS, b, h, H, F, V)
            weighted = load_rows(part_of, queries, queries < F, V)
            out += weighted * (tl.exp(own_top - top) * inverse)[:, None]
    store_rows(slot_head(output, 0, 1, b, h, H, F, V), queries, queries < F, out, V)


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    query, image, audio, output_grad, image_blocks, audio_blocks, statistics,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and reads one of SPLITS parts of its tokens.
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    image, audio = modality(image, b, h, I), modality(audio, b, h, A)
    image_blocks = of_blocks(image_blocks, b, h, H, queries, F)
    audio_blocks = of_blocks(audio_blocks, b, h, H, queries, F)

    q = load_rows(head(query, b, h), queries, queries < F, K)
    do = load_rows(head(output_grad, b, h), queries, queries < F, V)
    of_image = attend(q, do, image, image_blocks, split, scale, K, V, SPLITS, PRECISION, BLOCK_F, BLOCK_N)
    store_statistics(statistics, 0, split, b, h, H, queries, F, *of_image, SPLITS)
    of_audio = attend(q, do, audio, audio_blocks, split, scale, K, V, SPLITS, PRECISION, BLOCK_F, BLOCK_N)
    store_statistics(statistics, 1, split, b, h, H, queries, F, *of_audio, SPLITS)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    query, image, audio, output_grad, image_blocks, audio_blocks, statistics,
    query_grad, image_key_grad, image_value_grad, audio_key_grad, audio_value_grad,
    H, F, I, A, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and reads one of SPLITS parts of its tokens.
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(2)
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    queries = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    image, audio = modality(image, b, h, I), modality(audio, b, h, A)
    image_blocks = of_blocks(image_blocks, b, h, H, queries, F)
    audio_blocks = of_blocks(audio_blocks, b, h, H, queries, F)
    image_grads = (
        slot_head(image_key_grad, tile, tiles, b, h, H, I, K),
        slot_head(image_value_grad, tile, tiles, b, h, H, I, V),
    )
    audio_grads = (
        slot_head(audio_key_grad, tile, tiles, b, h, H, A, K),
        slot_head(audio_value_grad, tile, tiles, b, h, H, A, V),
    )

    q = load_rows(head(query, b, h), queries, queries < F, K)
    do = load_rows(head(output_grad, b, h), queries, queries < F, V)
    dq = tl.zeros((padded(K), BLOCK_F), tl.float32)
    for number in tl.static_range(2):
        side, grads = (image, image_grads) if number == 0 else (audio, audio_grads)
        blocks = image_blocks if number == 0 else audio_blocks
        if SPLITS == 1:
            top, total, weighted = attend(
                q, do, side, blocks, split, scale, K, V, SPLITS, PRECISION, BLOCK_F, BLOCK_N
            )
            top, inverse = finite(top), reciprocal(total)
            delta = weighted * inverse
        else:
            top, inverse, delta = load_statistics(statistics, number, b, h, H, queries, F, SPLITS)
        dq = differentiate(
            dq, q, do, side, blocks, grads, top, inverse, delta, split, scale,
            K, V, SPLITS, PRECISION, BLOCK_N,
        )  # fmt: skip
    store_rows(
        slot_head(query_grad, split, SPLITS, b, h, H, F, K), queries, queries < F, tl.trans(dq * scale), K
    )


@triton.jit
def differentiate(
    dq, q, do, side, blocks, grads, top, inverse, delta, split, scale,
    K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of keys and values of one modality; adds to that of the queries, (K, BLOCK_F)."""
    first, last = part(side[TOKENS], split, SPLITS, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        k, v, attended = load_tokens(tokens, side, K, V)
        logits = logits_of(q, k, attended, scale, PRECISION)
        logits = plus_beside(logits, blocks, BESIDE, tokens, attended)
        weights = tl.exp(logits - top) * inverse
        dv = tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        weights_grad = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        weights_grad = plus_beside(weights_grad, blocks, GRADS_BESIDE, tokens, attended)
        logits_grad = (weights * (weights_grad - delta)).to(q.dtype)
        dk = tl.dot(logits_grad, q, input_precision=PRECISION) * scale
        dq += tl.dot(tl.trans(k), logits_grad, input_precision=PRECISION)

        store_rows(grads[1], tokens, tokens < side[TOKENS], dv, V)
        store_rows(grads[0], tokens, tokens < side[TOKENS], dk, K)
    return dq


# --- what both directions share -----------------------------------------------------------------------------


@triton.jit
def part(N, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """First and last + 1 of the tokens of one of SPLITS parts, which begin at multiples of BLOCK_N."""
    size = tl.cdiv(N, SPLITS * BLOCK_N) * BLOCK_N
    return split * size, tl.minimum(split * size + size, N)


@triton.jit
def of_blocks(blocks, b, h, H, queries, F):
    """What is beside the blocks of one modality, of one head of one clip (logits and gradients), how many
    tokens a block has, and which queries ask.
    """
    if blocks is None:
        nothing = tl.full((), 0, tl.int32)  # a compiled function returns no None: see `plus_beside`
        return nothing, nothing, nothing, nothing, nothing
    else:
        beside, grads_beside, size, number = blocks
        first = (tl.cast(b, tl.int64) * H + h) * number * F
        return beside + first, grads_beside + first, size, queries, F


@triton.jit
def plus_beside(x, blocks, WHICH: tl.constexpr, tokens, attended):
    """x (BLOCK_N, BLOCK_F), and what is beside the block of each token, if there are blocks."""
    if blocks[WHICH].dtype.is_ptr():
        size, queries, F = blocks[2], blocks[3], blocks[4]
        inside = attended[:, None] & (queries < F)[None, :]
        x += tl.load(blocks[WHICH] + (tokens // size)[:, None] * F + queries[None, :], mask=inside, other=0.0)
    return x


@triton.jit
def store_statistics(
    statistics, modality: tl.constexpr, split, b, h, H, queries, F, top, total, weighted, SPLITS: tl.constexpr
):
    """Keeps what one split found about its queries in a tensor (B, modality, quantity, SPLITS, F, H)."""
    statistics, stride = slot_head(statistics, 3 * modality * SPLITS + split, 6 * SPLITS, b, h, H, F, 1)
    statistics, step = statistics + queries * stride, SPLITS * F * H
    tl.store(statistics, top, mask=queries < F)
    tl.store(statistics + step, total, mask=queries < F)
    tl.store(statistics + 2 * step, weighted, mask=queries < F)


@triton.jit
def load_statistics(statistics, modality: tl.constexpr, b, h, H, queries, F, SPLITS: tl.constexpr):
    """Merges the splits: largest logit, 1 / sum of weights, and delta, (BLOCK_F,) each."""
    statistics, stride = slot_head(statistics, 3 * modality * SPLITS, 6 * SPLITS, b, h, H, F, 1)
    splits = tl.arange(0, SPLITS)[:, None]
    pointers = statistics + splits * F * stride + queries[None, :] * stride  # (SPLITS, BLOCK_F)
    step, inside = SPLITS * F * H, (queries < F)[None, :]
    tops = tl.load(pointers, mask=inside, other=float("-inf"))
    totals = tl.load(pointers + step, mask=inside, other=0.0)
    weighted = tl.load(pointers + 2 * step, mask=inside, other=0.0)
    top = finite(tl.max(tops, 0))
    rescale = tl.exp(tops - top[None, :])
    inverse = reciprocal(tl.sum(weigh(rescale, totals), 0))
    return top, inverse, tl.sum(weigh(rescale, weighted), 0) * inverse


# --- the host's side ----------------------------------------------------------------------------------------


def forward(
    query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, scale,
    blocks=(None, None),
):  # fmt: skip
    """(B, H, F, K), (B, H, I, K), (B, H, I, V), (B, H, A, K), (B, H, A, V) -> (B, H, F, V), which lies in
    memory as (B, F, H, V). Masks (B, I) and (B, A) bool or None. `blocks` is what blocked_pair_attention.py
    adds to the logits of image and of audio tokens.
    """
    inputs, sizes = prepared(query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask)
    options = settings(query.dtype, *sizes, device=query.device, blocked=blocks[0] is not None)
    return launch_forward(forward_kernel, (*inputs, *blocks), query, sizes, scale, options)


def launch_forward(kernel, inputs, query, sizes, scale, options):
    """The output of a kernel; if splits share its heads, of `merge_kernel`."""
    B, H, F, I, A, _, V = sizes
    splits, tiles = options["SPLITS"], triton.cdiv(F, options["BLOCK_F"])
    output, statistics, partial = query.new_empty((B, F, H, V)), None, None
    if splits > 1:
        statistics = empty_statistics(query, splits)
        partial = query.new_empty((B, 2, splits, F, H, V), dtype=torch.float32)
    with on_device_of(query):
        kernel[B * H, tiles, splits](*inputs, output, statistics, partial, H, F, I, A, scale, **options)
        if splits > 1:
            merge_kernel[B * H, tiles](
                statistics, partial, output, H, F, V=V, SPLITS=splits, BLOCK_F=options["BLOCK_F"],
                enable_fp_fusion=options["enable_fp_fusion"],
            )  # fmt: skip
    return output.transpose(1, 2)


def backward(
    output_grad, query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, scale,
    blocks=(None, None),
):  # fmt: skip
    """Gradients of query, image_key, image_value, audio_key and audio_value."""
    tensors = query, image_key, image_value, audio_key, audio_value
    inputs, sizes = prepared(*tensors, image_mask, audio_mask)
    options = settings(query.dtype, *sizes, backward=True, device=query.device, blocked=blocks[0] is not None)
    inputs = *inputs, with_strides(output_grad), *blocks
    statistics = empty_statistics(query, options["SPLITS"]) if options["SPLITS"] > 1 else None
    kernels = statistics_kernel, backward_kernel
    return launch_backward(*kernels, inputs, statistics, tensors, sizes, scale, options)


def launch_backward(statistics_kernel, backward_kernel, inputs, statistics, tensors, sizes, scale, options):
    """The gradients of tensors. The first kernel is for splits that share a head: it leaves statistics of its
    softmax for the second.
    """
    query, (B, H, F, I, A, *_) = tensors[0], sizes
    splits, tiles = options["SPLITS"], triton.cdiv(F, options["BLOCK_F"])
    grads = [empty_slots(query, splits), *(empty_slots(tensor, tiles) for tensor in tensors[1:])]
    grid, numbers = (B * H, tiles, splits), (H, F, I, A, scale)
    with on_device_of(query):
        if splits > 1:
            statistics_kernel[grid](*inputs, statistics, *numbers, **options)
        backward_kernel[grid](*inputs, statistics, *grads, *numbers, **options)
        return [add_slots(grad, query.dtype) for grad in grads]


def empty_statistics(query, splits):
    """Room for six numbers of each query, from each split."""
    B, H, F, _ = query.shape
    return query.new_empty((B, 6, splits, F, H), dtype=torch.float32)


def settings(dtype, B, H, F, I, A, K, V, *, backward=False, device=None, blocked=False):
    """Tile sizes and launch options, some of which a card may have of its own (`cards.OWN`).
    kernels/README.md says where they come from.
    """
    return _settings(precision_of(dtype), dtype, B, H, F, I, A, K, V, backward, device, blocked)


@functools.lru_cache(1024)  # worked out anew, they would cost as much as an operator of PyTorch
def _settings(precision, dtype, B, H, F, I, A, K, V, backward, device, blocked):
    single, width = dtype == torch.float32, max(K, V)
    wide = width > 64
    block_f = min(padded(F), 16 if wide else 32)
    splits, programs = 1, B * H * triton.cdiv(F, block_f)
    while 2 * splits * programs <= PROGRAMS and 2 * splits * SPLIT_TOKENS <= max(I, A):
        splits *= 2
    # Few warps: what 4 of them multiply in tiles of 64 tokens becomes wgmma on Hopper, which is half as fast
    # here, and which Triton 3.6 compiled to reads outside of shared memory (128 tokens, widths of 64).
    if wide:
        block_n, warps = 16 if single else 32, 8
    elif single:
        block_n, warps = 16, block_f // (16 if width <= 16 else 4 if blocked else 8)
    else:
        block_n, warps = 64 if width <= 16 and not (blocked or backward) else 32, block_f // 16
    return dict(
        K=K,
        V=V,
        SPLITS=splits,
        PRECISION=precision,
        BLOCK_F=block_f,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=1 if single and backward and width > 32 else 2,
        enable_fp_fusion=True,  # Triton's default until 3.10
        maxnreg=255,  # else ptxas spills a little here and there, to fit one program more on a multiprocessor
    ) | own_settings(device, "blocked_" * blocked + "pair_attention", backward, dtype, block_f, width)
