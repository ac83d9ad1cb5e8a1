"""What the kernels share: tiles of a matrix of tokens (rows) or queries, and the layout of their results."""

import contextlib

import torch
import triton
import triton.language as tl

BIAS_PROGRAMS = 1024  # what shares a tile of the bias is divided until there are so many


@triton.constexpr_function
def padded(width):
    """The width of a tile: tl.dot takes powers of 2 from 16 on."""
    return max(16, 1 << (width - 1).bit_length())


@triton.jit
def head(tensor, b, h):
    """The matrix (N, WIDTH) of one head of one clip in a tensor (B, H, N, WIDTH) with its strides: where it
    begins, and the stride of its rows.
    """
    pointer, strides = tensor
    return pointer + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1], strides[2]


@triton.jit
def pairs(bias, b, h):
    """The bias of one head of one clip: where it begins, and the strides of image tokens and audio tokens."""
    pointer, row_stride = head(bias, b, h)
    return pointer, row_stride, bias[1][3]


@triton.jit
def slot_head(pointer, slot, slots, b, h, H, N, WIDTH: tl.constexpr):
    """The matrix (N, WIDTH) of one head in results (B, slots, N, H, WIDTH)."""
    return pointer + (((tl.cast(b, tl.int64) * slots + slot) * N) * H + h) * WIDTH, H * WIDTH


@triton.jit
def load_rows(matrix, rows, present, WIDTH: tl.constexpr):
    """Those of the rows that are present; 0 elsewhere."""
    pointer, stride = matrix
    columns = tl.arange(0, padded(WIDTH))
    inside = present[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(matrix, rows, present, values, WIDTH: tl.constexpr):
    """Stores those of the rows that are present."""
    pointer, stride = matrix
    columns = tl.arange(0, padded(WIDTH))
    inside = present[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], values, mask=inside)


@triton.jit
def modality(tensors, b, h, N):
    """Keys, values, mask and number of tokens of one head of one clip."""
    key, value, mask = tensors
    if mask is not None:
        mask += tl.cast(b, tl.int64) * N
    else:
        mask = tl.full((), 0, tl.int32)  # a compiled function returns no None: see `load_mask`
    return head(key, b, h), head(value, b, h), mask, N


@triton.jit
def load_mask(mask, tokens, N):
    """Which of the tokens of one clip may be attended to."""
    attended = tokens < N
    if mask.dtype.is_ptr():
        attended = attended & tl.load(mask + tokens, mask=attended, other=False)
    return attended


@triton.jit
def load_tokens(tokens, side, K: tl.constexpr, V: tl.constexpr):
    """Keys and values of those tokens of a modality that may be attended to (0 elsewhere), and which may."""
    key, value, mask, N = side
    attended = load_mask(mask, tokens, N)
    k = load_rows(key, tokens, attended, K)
    v = load_rows(value, tokens, attended, V)
    return k, v, attended


@triton.jit
def logits_of(q, k, attended, scale, PRECISION: tl.constexpr):
    """Logits (BLOCK_N, BLOCK_F), -inf at tokens that are not attended to."""
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    return tl.where(attended[:, None], logits, float("-inf"))


@triton.jit
def finite(top):
    """The largest of no logits is -inf; 0 in its place makes all weights exp(-inf - 0) = 0 instead of NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def reciprocal(total):
    """1 / total, or 0 of nothing."""
    return tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)


@triton.jit
def weigh(weights, values):
    """weights * values, about to be summed over lanes. The `where` keeps the compiler from fusing the product
    with the first addition: of two lanes that add each other's product to their own, each would then round
    only the other's, and both would store their differing sums to one address.
    """
    return tl.where(weights != 0.0, weights * values, 0.0)


@triton.jit
def shared_range(own, size, full):
    """The clips or heads that share a matrix of the bias: all where it has one for all."""
    return tl.where(size == 1, 0, own), tl.where(size == 1, full, own + 1)


@triton.jit
def own_shares(shares):
    """First and last + 1 of those that are this program's; the second dimension of the grid divides them."""
    size = tl.cdiv(shares, tl.num_programs(1))
    return tl.program_id(1) * size, tl.minimum(tl.program_id(1) * size + size, shares)


# --- the host's side ----------------------------------------------------------------------------------------


def prepared(query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask):
    """What the kernels read: the query, and keys, values and mask of each modality; and the sizes B, H, F, I,
    A, K, V.
    """
    image, audio = (
        (with_strides(key), with_strides(value), None if mask is None else mask.contiguous())
        for key, value, mask in ((image_key, image_value, image_mask), (audio_key, audio_value, audio_mask))
    )
    (B, H, F, K), V = query.shape, image_value.shape[3]
    return (with_strides(query), image, audio), (B, H, F, image_key.shape[2], audio_key.shape[2], K, V)


def with_strides(tensor):
    """A tensor (B, H, N, WIDTH) and the strides of B, H and N. Its rows have adjacent elements: those of all
    that projections produce do.
    """
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor, tensor.stride()[:3]


def broadcast(bias):
    """A bias (B or 1, H or 1, ...) and its strides, 0 along what has one for all."""
    return bias, tuple(0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))


def precision_of(dtype):
    """How tl.dot treats float32: as the rest of PyTorch is told to."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def on_device_of(tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def empty_slots(like, slots):
    """Room for results like the tensor (B, H, N, WIDTH): (B, N, H, WIDTH) in its dtype where there is one
    slot, (B, slots, N, H, WIDTH) in float32 where several are to be added.
    """
    B, H, N, width = like.shape
    if slots == 1:
        return like.new_empty((B, N, H, width))
    return like.new_empty((B, slots, N, H, width), dtype=torch.float32)


def add_slots(results, dtype):
    """(B, N, H, WIDTH) or (B, slots, N, H, WIDTH) -> (B, H, N, WIDTH)"""
    total = results if results.ndim == 4 else results.sum(1).to(dtype)
    return total.transpose(1, 2)


def empty_bias_slots(pair_bias, tiles, shares):
    """Room for the gradient of a bias (slots, B or 1, H or 1, I, A) of so many tiles: as many slots as let
    BIAS_PROGRAMS programs share the work, of which each matrix of the bias has a part.
    """
    shape, slots = tuple(pair_bias.shape), 1
    matrices = shape[0] * shape[1]
    while 2 * slots * matrices * tiles <= BIAS_PROGRAMS and 2 * slots <= shares // max(1, matrices):
        slots *= 2
    dtype = pair_bias.dtype if slots == 1 else torch.float32
    return pair_bias.new_empty((slots, *shape), dtype=dtype)


def add_bias_slots(slots, dtype):
    return slots[0] if len(slots) == 1 else slots.sum(0).to(dtype)
