"""Pair attention with a bias b_st of each block of pairs, -inf where they are masked: s are blocks of as many
consecutive image tokens each, t of audio tokens, of one token at least.

    P_ij = softmax_ij(x_ij)                          x_ij = c q.k_i + c q.k_j + b_st,  c = scale
                                                     i in block s, j in block t

The softmax has two levels. For one query, all that the other modality needs to know of block s is its
log-sum-exp L_s and, backward, its mean G_s of do.v. And all that the tokens of s need to know of the other
modality are two numbers again, which the code calls *beside* s: a_s is added to their logits, h_s to their
do.v.

    L_s = log sum_{i in s} exp(c q.k_i)              G_s = sum_{i in s} softmax_{i in s}(c q.k_i) do.v_i
    beside s: a_s = log sum_t exp(L_t + b_st)        h_s = sum_t softmax_t(L_t + b_st) G_t;   t likewise
    p_i  = sum_j P_ij = softmax_i(c q.k_i + a_s)     dx_i = sum_j dx_ij = p_i (do.v_i + h_s - delta)
    o    = sum_i p_i v_i + sum_j r_j v_j             delta = sum_i p_i (do.v_i + h_s);        j likewise
    db_st = sum_q P_st (G_s + G_t - delta)           P_st = softmax_st(L_s + L_t + b_st)

So marginals are softmaxes of tokens again, and pair_attention.py does the rest. This costs I + A + S * T, and
stores numbers of each query and block, not of pairs of blocks. Exponents are relative to the largest logit,
so the result is exact for any finite logits. Nothing stands beside the blocks where the other modality has
no token left: a_s = h_s = 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import pair_attention
from .pair_attention import COUNTS
from .tiles import (
    add_bias_slots,
    broadcast,
    empty_bias_slots,
    finite,
    head,
    load_rows,
    load_tokens,
    logits_of,
    modality,
    on_device_of,
    own_shares,
    pairs,
    prepared,
    reciprocal,
    shared_range,
    weigh,
    with_strides,
)

# Of the kernels that read no tokens: queries and blocks of a tile; so many of the other modality's blocks are
# looked at together, as each by itself would wait for memory.
BLOCK_F, BLOCK, BIAS_BLOCK = 16, 8, 16
TOGETHER = tl.constexpr(4)
LAUNCH = dict(enable_fp_fusion=True, maxnreg=255)


class Blocks(NamedTuple):
    """What is known of the blocks of one modality, each (B, H, number, F) in float32."""

    logits: torch.Tensor  # L_s
    grads: torch.Tensor | None  # G_s
    beside: torch.Tensor  # a_s
    grads_beside: torch.Tensor | None  # h_s
    size: int  # in tokens

    @classmethod
    def empty(cls, query, tokens, number, with_grads):
        B, H, F, _ = query.shape
        needed = True, with_grads, True, with_grads
        tensors = [
            query.new_empty((B, H, number, F), dtype=torch.float32) if each else None for each in needed
        ]
        return cls(*tensors, size=tokens // number)

    @property
    def number(self):
        return self.logits.shape[2]

    @property
    def beside_tokens(self):
        """What the kernels of pair_attention.py need to know; the forward does not look at gradients."""
        grads = self.beside if self.grads_beside is None else self.grads_beside
        return self.beside, grads, self.size, self.number


# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*COUNTS, "image_size", "audio_size"])
def block_kernel(
    query, image, audio, output_grad, image_blocks, audio_blocks,
    H, F, I, A, image_size, audio_size, scale: tl.float32,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, IMAGE_ROWS: tl.constexpr, AUDIO_ROWS: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and as many blocks of one modality as BLOCK_N
    # has ROWS; first come those of the image.
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    q, do = load_rows(head(query, b, h), queries, queries < F, K), output_grad
    if output_grad is not None:
        do = load_rows(head(output_grad, b, h), queries, queries < F, V)
    number, image_programs = tl.program_id(2), tl.cdiv(I // image_size, BLOCK_N // IMAGE_ROWS)
    if number < image_programs:
        survey_blocks(
            q, do, modality(image, b, h, I), image_blocks, number, b, h, H, queries, F, I, image_size,
            scale, K, V, PRECISION, BLOCK_F, BLOCK_N, IMAGE_ROWS,
        )  # fmt: skip
    else:
        survey_blocks(
            q, do, modality(audio, b, h, A), audio_blocks, number - image_programs, b, h, H, queries, F, A,
            audio_size, scale, K, V, PRECISION, BLOCK_F, BLOCK_N, AUDIO_ROWS,
        )  # fmt: skip


@triton.jit
def survey_blocks(
    q, do, side, blocks, number, b, h, H, queries, F, N, size, scale,
    K: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores L_s and, with the gradient do, G_s of the blocks of one program."""
    OWN: tl.constexpr = BLOCK_N // ROWS
    first, rows = number * OWN, tl.arange(0, BLOCK_N)
    top = tl.full((OWN, BLOCK_F), float("-inf"), tl.float32)
    total, weighted = tl.zeros((OWN, BLOCK_F), tl.float32), tl.zeros((OWN, BLOCK_F), tl.float32)
    for start in range(0, size, ROWS):
        within = start + rows % ROWS
        tokens = tl.where(within < size, (first + rows // ROWS) * size + within, N)  # N: not there
        k, v, attended = load_tokens(tokens, side, K, V)
        logits = tl.reshape(logits_of(q, k, attended, scale, PRECISION), (OWN, ROWS, BLOCK_F))
        previous, top = top, tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - finite(top)[:, None, :])
        rescale = tl.exp(previous - finite(top))
        total = total * rescale + tl.sum(weights, 1)
        if do is not None:
            weights_grad = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            weights_grad = tl.reshape(weights_grad, (OWN, ROWS, BLOCK_F))
            weighted = weighted * rescale + tl.sum(weigh(weights, weights_grad), 1)
    offsets, inside = tile_of(b, h, H, first + tl.arange(0, OWN), N // size, queries, F)
    tl.store(blocks[0] + offsets, top + log(total), mask=inside)
    if do is not None:
        tl.store(blocks[1] + offsets, weighted * reciprocal(total), mask=inside)


@triton.jit(do_not_specialize=["F", "S", "T"])
def beside_kernel(
    image, audio, bias, image_beside, audio_beside, H, F, S, T, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip, and BLOCK blocks of one modality; first come
    # those of the image.
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    number, image_programs = tl.program_id(2), tl.cdiv(S, BLOCK)
    bias, image_step, audio_step = pairs(bias, b, h)
    if number < image_programs:
        look_beside(
            audio, (bias, image_step, audio_step), image_beside, number, b, h, H, queries, F, S, T,
            BLOCK_F, BLOCK,
        )  # fmt: skip
    else:
        look_beside(
            image, (bias, audio_step, image_step), audio_beside, number - image_programs, b, h, H, queries,
            F, T, S, BLOCK_F, BLOCK,
        )  # fmt: skip


@triton.jit
def look_beside(
    other, bias, beside, number, b, h, H, queries, F, N, M, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stores a_s and, with gradients, h_s of the blocks of one program. It walks the M blocks of the other
    modality one by one, twice: so no thread waits for what another adds up.
    """
    other_logits, other_grads = other
    own = number * BLOCK + tl.arange(0, BLOCK)
    row, query_mask = first_row(b, h, H, M, F) + queries[None, :], (queries < F)[None, :]
    bias, step = steps(bias[0], own[:, None], bias[1]), bias[2]
    present = (own < N)[:, None]

    largest = tl.full((1, BLOCK_F), float("-inf"), tl.float32)  # without a bias
    top = tl.full((BLOCK, BLOCK_F), float("-inf"), tl.float32)
    for m in tl.range(M, loop_unroll_factor=TOGETHER):
        logits = tl.load(other_logits + row + m * F, mask=query_mask, other=float("-inf"))
        own_bias = tl.load(steps(bias, m, step), mask=present, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, logits)
        top = tl.maximum(top, logits + own_bias)
    total, weighted = tl.zeros((BLOCK, BLOCK_F), tl.float32), tl.zeros((BLOCK, BLOCK_F), tl.float32)
    for m in tl.range(M, loop_unroll_factor=TOGETHER):
        logits = tl.load(other_logits + row + m * F, mask=query_mask, other=float("-inf"))
        own_bias = tl.load(steps(bias, m, step), mask=present, other=0.0).to(tl.float32)
        weights = tl.exp(logits + own_bias - finite(top))
        total += weights
        if other_grads is not None:
            weighted += weights * tl.load(other_grads + row + m * F, mask=query_mask, other=0.0)

    offsets, inside = tile_of(b, h, H, own, N, queries, F)
    tl.store(beside[0] + offsets, tl.where(largest == float("-inf"), 0.0, top + log(total)), mask=inside)
    if other_grads is not None:
        tl.store(beside[1] + offsets, weighted * reciprocal(total), mask=inside)


@triton.jit(do_not_specialize=["F", "S"])
def softmax_kernel(
    image, beside, statistics, H, F, S, BLOCK_F: tl.constexpr
):  # fmt: skip
    # One program owns BLOCK_F queries of one head of one clip. Of the softmax over their pairs of blocks it
    # leaves the largest logit, 1 / sum of weights, and delta in a tensor (B, H, 3, F).
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    queries = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row, query_mask = first_row(b, h, H, S, F) + queries, queries < F
    image_logits, image_grads = image
    beside, grads_beside = beside
    top = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    for s in tl.range(S, loop_unroll_factor=TOGETHER):
        logits = tl.load(image_logits + row + s * F, mask=query_mask, other=float("-inf"))
        top = tl.maximum(top, logits + tl.load(beside + row + s * F, mask=query_mask, other=0.0))
    total, weighted = tl.zeros((BLOCK_F,), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    for s in tl.range(S, loop_unroll_factor=TOGETHER):
        logits = tl.load(image_logits + row + s * F, mask=query_mask, other=float("-inf"))
        logits += tl.load(beside + row + s * F, mask=query_mask, other=0.0)
        grads = tl.load(image_grads + row + s * F, mask=query_mask, other=0.0)
        grads += tl.load(grads_beside + row + s * F, mask=query_mask, other=0.0)
        weights = tl.exp(logits - finite(top))
        total += weights
        weighted += weights * grads
    statistics += first_row(b, h, H, 3, F) + queries
    tl.store(statistics, finite(top), mask=query_mask)
    tl.store(statistics + F, reciprocal(total), mask=query_mask)
    tl.store(statistics + 2 * F, weighted * reciprocal(total), mask=query_mask)


@triton.jit(do_not_specialize=["F"])
def block_bias_kernel(
    image, audio, statistics, bias, bias_grad, bias_sizes, B, H, F, BLOCK: tl.constexpr
):  # fmt: skip
    # One program owns a tile of the bias, and walks a part of the clips and heads that share it, query by
    # query.
    image_logits, image_grads = image
    audio_logits, audio_grads = audio
    S, T = bias_sizes[2], bias_sizes[3]
    tiles = tl.cdiv(S, BLOCK)
    tiles_of_head = tiles * tl.cdiv(T, BLOCK)
    matrix, tile = tl.program_id(0) // tiles_of_head, tl.program_id(0) % tiles_of_head
    first_b, last_b = shared_range(matrix // bias_sizes[1], bias_sizes[0], B)
    first_h, last_h = shared_range(matrix % bias_sizes[1], bias_sizes[1], H)
    heads = last_h - first_h
    first, last = own_shares((last_b - first_b) * heads)
    rows = (tile % tiles * BLOCK + tl.arange(0, BLOCK))[:, None]
    columns = (tile // tiles * BLOCK + tl.arange(0, BLOCK))[None, :]
    bias, row_stride, column_stride = pairs(bias, first_b, first_h)
    bias = steps(steps(bias, rows, row_stride), columns, column_stride)
    inside = (rows < S) & (columns < T)
    own_bias = tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    grad = tl.zeros((BLOCK, BLOCK), tl.float32)
    for n in range(first, last):
        b, h = first_b + n // heads, first_h + n % heads
        row, column = first_row(b, h, H, S, F) + rows * F, first_row(b, h, H, T, F) + columns * F
        of_softmax = statistics + first_row(b, h, H, 3, F)
        for query in range(F):
            logits = tl.load(image_logits + row + query, mask=rows < S, other=float("-inf"))
            logits += tl.load(audio_logits + column + query, mask=columns < T, other=float("-inf"))
            grads = tl.load(image_grads + row + query, mask=rows < S, other=0.0)
            grads += tl.load(audio_grads + column + query, mask=columns < T, other=0.0)
            top, inverse = tl.load(of_softmax + query), tl.load(of_softmax + F + query)
            delta = tl.load(of_softmax + 2 * F + query)
            grad += tl.exp(logits + own_bias - top) * inverse * (grads - delta)
    matrices = bias_sizes[0] * bias_sizes[1]
    bias_grad += ((tl.program_id(1) * matrices + matrix).to(tl.int64) * S + rows) * T + columns
    tl.store(bias_grad, grad, mask=inside)


@triton.jit
def first_row(b, h, H, N, F):
    """Where the numbers of one head of one clip begin in (B, H, N, F)."""
    return (tl.cast(b, tl.int64) * H + h) * N * F


@triton.jit
def steps(pointer, n, stride):
    return pointer + tl.cast(n, tl.int64) * stride


@triton.jit
def tile_of(b, h, H, blocks, N, queries, F):
    """Where a tile (blocks, queries) of one head of one clip lies in (B, H, N, F), and what is there."""
    inside = (blocks < N)[:, None] & (queries < F)[None, :]
    return first_row(b, h, H, N, F) + blocks.to(tl.int64)[:, None] * F + queries[None, :], inside


@triton.jit
def log(total):
    """0 of nothing, whose largest logit is -inf. NaN stays NaN, which a maximum on a GPU passes over."""
    return tl.log(tl.where(total == 0.0, 1.0, total))


# --- the host's side ----------------------------------------------------------------------------------------


def forward(query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, scale):
    """As `forward` of pair_attention.py, with pair_bias (B or 1, H or 1, S, T)."""
    inputs = query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask
    image, audio = blocks_of(inputs, pair_bias, scale)
    return pair_attention.forward(*inputs, scale, (image.beside_tokens, audio.beside_tokens))


def backward(output_grad, *inputs):
    """As `backward` of biased_pair_attention.py."""
    *inputs, pair_bias, scale, bias_grad = inputs
    image, audio = blocks_of(inputs, pair_bias, scale, output_grad)
    blocks = image.beside_tokens, audio.beside_tokens
    grads = pair_attention.backward(output_grad, *inputs, scale, blocks)
    if bias_grad:
        (B, H, F, _), sizes, query = inputs[0].shape, tuple(pair_bias.shape), inputs[0]
        tiles = triton.cdiv(sizes[2], BIAS_BLOCK) * triton.cdiv(sizes[3], BIAS_BLOCK)
        statistics = query.new_empty((B, H, 3, F), dtype=torch.float32)
        slots = empty_bias_slots(pair_bias, tiles, B * H)
        with on_device_of(pair_bias):
            softmax_kernel[B * H, triton.cdiv(F, BLOCK_F)](
                image[:2], image[2:4], statistics, H, F, sizes[2], BLOCK_F=BLOCK_F, num_warps=2, **LAUNCH
            )
            block_bias_kernel[sizes[0] * sizes[1] * tiles, len(slots)](  # the first dimension may be large
                image[:2], audio[:2], statistics, broadcast(pair_bias), slots, sizes, B, H, F,
                BLOCK=BIAS_BLOCK, num_warps=2, **LAUNCH,
            )  # fmt: skip
        grads.append(add_bias_slots(slots, pair_bias.dtype))
    return grads


def blocks_of(inputs, pair_bias, scale, output_grad=None):
    """What is known of the blocks of image and of audio tokens, with gradients if there is that of the
    output.
    """
    query, with_grads = inputs[0], output_grad is not None
    inputs, sizes = prepared(*inputs)
    B, H, F, I, A, *_ = sizes
    options = pair_attention.settings(
        query.dtype, *sizes, backward=with_grads, device=query.device, blocked=True
    )
    options = {name: value for name, value in options.items() if name != "SPLITS"}
    S, T = pair_bias.shape[2:]
    image, audio = Blocks.empty(query, I, S, with_grads), Blocks.empty(query, A, T, with_grads)
    rows = [min(triton.next_power_of_2(own.size), options["BLOCK_N"]) for own in (image, audio)]
    programs = [
        triton.cdiv(own.number, options["BLOCK_N"] // each)
        for own, each in zip((image, audio), rows, strict=True)
    ]
    with on_device_of(query):
        block_kernel[B * H, triton.cdiv(F, options["BLOCK_F"]), sum(programs)](
            *inputs, with_strides(output_grad) if with_grads else None, image[:2], audio[:2],
            H, F, I, A, image.size, audio.size, scale, IMAGE_ROWS=rows[0], AUDIO_ROWS=rows[1], **options,
        )  # fmt: skip
        beside_kernel[B * H, triton.cdiv(F, BLOCK_F), triton.cdiv(S, BLOCK) + triton.cdiv(T, BLOCK)](
            image[:2], audio[:2], broadcast(pair_bias), image[2:4], audio[2:4], H, F, S, T,
            BLOCK_F=BLOCK_F, BLOCK=BLOCK, num_warps=1, **LAUNCH,
        )  # fmt: skip
    return image, audio
