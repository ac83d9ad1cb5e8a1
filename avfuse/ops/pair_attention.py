"""Cross-attention of a few queries over every pair of one image token i and one audio token j, never storing
the pairs.

Additive pairs (paper Eq. 4-7) have keys k_i + k_j and values v_i + v_j, so the softmax over pairs factorizes:

    softmax_ij(q.k_i + q.k_j) = softmax_i(q.k_i) softmax_j(q.k_j)
    sum_ij p_i r_j (v_i + v_j) = sum_i p_i v_i + sum_j r_j v_j

Exact dense interactions are the sum of two cross-attentions that share a query: cost I + A, not I * A.
With a pair bias b_ij the weights no longer factorize, but additive values still need only the two marginals
of the joint softmax. Bilinear pairs (keys k_i * k_j, values v_i * v_j) do real work per pair. Both go over
chunks of pairs.

A bias may be coarser than the tokens: let the image tokens fall into S blocks of equal size, such as the
frames of a clip, and b depend on the block s only. The softmax over pairs then has two levels,

    P_sj = softmax_sj(L_s + q.k_j + b_sj)              L_s = log sum_{i in s} exp(q.k_i)
    p_i  = sum_j P_sj * softmax_{i in s}(q.k_i)        r_j = sum_s P_sj

and likewise for T blocks of audio tokens: cost I + A + S * T, not I * A.

Shapes: B batch, H heads, F fusion tokens (queries), I image tokens, A audio tokens, N tokens of either kind,
S and T blocks of image and of audio tokens, K and V widths per head.
"""

import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_choice,
    check_mask,
    check_tensor,
    is_differentiating,
    is_exporting,
    is_number,
    without_autocast,
)
from .marginals import PairMarginals
from .operators import PairAttention
from .streaming import BilinearPairAttention, stream_marginals

PAIRS = {"additive": torch.add, "bilinear": torch.mul}  # how a pair combines two keys, and two values
BACKENDS = ("triton", "torch", "xformers", "reference")
HAS_TRITON, HAS_XFORMERS = (importlib.util.find_spec(name) is not None for name in ("triton", "xformers"))
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_WIDTH = 128  # keys and values of a head; tests go up to 80


class Side(NamedTuple):
    """One modality: the keys and values of its tokens, and which of them may be attended to."""

    key: Tensor  # (B, H, N, K)
    value: Tensor | None  # (B, H, N, V); None where only weights are computed
    mask: Tensor | None = None  # (B, N) bool, True = attend


def reference(query, image, audio, pair_bias, scale, interaction):
    """Paper Eq. 4-7 as written: a key and a value for every pair, one softmax over all pairs. The oracle of
    the tests, and the slow row of the tables.

    Where a modality is dead (no token left), equal tokens of 0 stand for it, and the bias is 0.
    """
    combine, alive = PAIRS[interaction], (_alive(image.mask), _alive(audio.mask))
    image_key, audio_key = map(_zero_where_dead, (image.key, audio.key), alive)
    key = combine(image_key[:, :, :, None], audio_key[:, :, None])  # (B, H, I, A, K)
    logits = torch.einsum("bhfk,bhijk->bhfij", query, key) * scale
    if pair_bias is not None:
        bias = _of_pairs(pair_bias, logits.shape[-2:])
        bias = _zero_where_dead(bias.to(logits.dtype), alive[0] & alive[1])
        logits = logits + bias[:, :, None]
    if image.mask is not None:
        logits = logits.masked_fill(~_attended(image.mask)[..., None], -math.inf)
    if audio.mask is not None:
        logits = logits.masked_fill(~_attended(audio.mask)[..., None, :], -math.inf)
    none_left = (logits == -math.inf).all((-2, -1), keepdim=True)
    weights = logits.masked_fill(none_left, 0.0).flatten(-2).softmax(-1).view_as(logits)

    image_value, audio_value = map(_zero_where_dead, (image.value, audio.value), alive)
    value = combine(image_value[:, :, :, None], audio_value[:, :, None])  # (B, H, I, A, V)
    return torch.einsum("bhfij,bhijv->bhfv", weights.masked_fill(none_left, 0.0), value)


def pair_attention(
    query: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    image_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    interaction: str = "additive",
    backend: str | None = None,
) -> Tensor:
    """Attention of `query` over all I x A pairs of image and audio tokens (paper Eq. 4-7), exact, never
    storing them.

    Args:
        query: (B, H, F, K).
        image_key, image_value: (B, H, I, K) and (B, H, I, V).
        audio_key, audio_value: (B, H, A, K) and (B, H, A, V).
        image_mask, audio_mask: (B, I) and (B, A) bool, True = attend. A modality without any token left
            contributes 0 and the other goes on alone, without the pair bias; with bilinear pairs the output
            is then 0. Such a modality may hold NaN; any other masked token must be finite.
        pair_bias: added to the logit of pair (i, j), broadcastable to (B, H, S, T), differentiable; -inf
            masks a pair. S divides I and T divides A: an entry serves a block of I/S x A/T consecutive
            pairs (bilinear pairs make one of I x A entries of it). A query with no pair left gets output 0
            and gradients 0.
        scale: of the logits; default K**-0.5.
        interaction: "additive" (k_i + k_j, v_i + v_j) or "bilinear" (k_i * k_j, v_i * v_j).
        backend: None picks "triton" on CUDA where it can, else "torch" (see `select_backend`); "xformers" has
            no pair bias and needs CUDA and torch 2.11 or older; "reference" materializes every pair.

    Returns:
        (B, H, F, V), in the dtype of `query`. Second derivatives and forward mode need backend="reference",
        or, of additive pairs without a bias, backend="torch" under `sdpa_kernel(SDPBackend.MATH)`.
        torch.func's transforms need backend="reference" for a pair bias, bilinear pairs and the kernels.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong, or the backend that is
            missing.
    """
    keys = dict(query=query, image_key=image_key, audio_key=audio_key)
    _check_tokens(**keys, image_value=image_value, audio_value=audio_value)
    image, audio = Side(image_key, image_value, image_mask), Side(audio_key, audio_value, audio_mask)
    _check_options(query, image, audio, pair_bias, scale, interaction)
    backend = select_backend(backend, query, image_value, interaction)
    if backend in ("torch", "xformers"):  # kernels do not read what is dead; the reference zeroes it itself
        image, audio = _without_dead(image), _without_dead(audio)
    options = dict(scale=scale, interaction=interaction, backend=backend)
    return attend_pairs(query, image, audio, pair_bias, **options)


def attend_pairs(
    query: Tensor,
    image: Side,
    audio: Side,
    pair_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    interaction: str = "additive",
    backend: str | None = None,
) -> Tensor:
    """`pair_attention` of what has been checked: for modules, which check once what they are given."""
    pair_bias = _four_dimensional(pair_bias)
    backend = select_backend(backend, query, image.value, interaction)
    run = {"triton": _triton, "torch": _torch, "xformers": _xformers, "reference": reference}[backend]
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with without_autocast(query.device):
        return run(query, image, audio, pair_bias, scale, interaction)


def pair_attention_weights(
    query: Tensor,
    image_key: Tensor,
    audio_key: Tensor,
    *,
    image_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
    pair_bias: Tensor | None = None,
    scale: float | None = None,
    interaction: str = "additive",
) -> tuple[Tensor, Tensor]:
    """The image and the audio marginal of the attention weights over pairs: where a query looks, what it
    listens to.

    Arguments as in `pair_attention`. Without a pair bias, the joint map of additive pairs is the outer
    product of the two. Differentiable.

    Returns:
        Image weights (B, H, F, I) and audio weights (B, H, F, A), each summing to 1 over its tokens; those
        of a modality without any token left are 0, and both where the output of `pair_attention` is 0 for
        lack of pairs.

    Raises:
        ValueError: as `pair_attention`.
    """
    _check_tokens(query=query, image_key=image_key, audio_key=audio_key)
    image, audio = Side(image_key, None, image_mask), Side(audio_key, None, audio_mask)
    _check_options(query, image, audio, pair_bias, scale, interaction)
    image, audio = _without_dead(image), _without_dead(audio)
    return pair_weights(query, image, audio, pair_bias, scale=scale, interaction=interaction)


def pair_weights(
    query: Tensor,
    image: Side,
    audio: Side,
    pair_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    interaction: str = "additive",
) -> tuple[Tensor, Tensor]:
    """`pair_attention_weights` of what has been checked."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    weights = _bilinear_weights if interaction == "bilinear" else _additive_weights
    with without_autocast(query.device):
        image_weights, audio_weights = weights(query, image, audio, _four_dimensional(pair_bias), scale)
        return image_weights.to(query.dtype), audio_weights.to(query.dtype)


# --- torch: exact and without a pair tensor -----------------------------------------------------------------


def _torch(query, image, audio, pair_bias, scale, interaction):
    if interaction == "bilinear":
        return _bilinear(query, image, audio, pair_bias, scale)
    if pair_bias is None:
        return masked_attention(query, *image, scale) + masked_attention(query, *audio, scale)
    image_weights, audio_weights = _additive_weights(query, image, audio, pair_bias, scale)
    image_value, audio_value = image.value.to(image_weights.dtype), audio.value.to(audio_weights.dtype)
    return (image_weights @ image_value + audio_weights @ audio_value).to(query.dtype)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Ordinary cross-attention (B, H, F, K) x (B, H, N, K) -> (B, H, F, V), one half of the identity.

    `mask` is (B, N) bool, True = attend; where it leaves no token, the output is 0 and so are the gradients.
    """
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=_attended(mask), scale=scale)
    return _zero_where_dead(attended, _alive(mask))


def masked_attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The weights (B, H, F, N) of `masked_attention`, each row summing to 1, or 0 where no token is left."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _masked_softmax(query @ key.mT * scale, mask)


def _additive_weights(query, image, audio, pair_bias, scale):
    """Marginals (B, H, F, I) and (B, H, F, A) of the joint softmax, in float32 or better."""
    query = query.to(torch.promote_types(query.dtype, torch.float32)) * scale
    image_logits = query @ image.key.to(query.dtype).mT
    audio_logits = query @ audio.key.to(query.dtype).mT
    if pair_bias is None:
        return _masked_softmax(image_logits, image.mask), _masked_softmax(audio_logits, audio.mask)
    if image.mask is None and audio.mask is None:
        return _marginals(image_logits, audio_logits, pair_bias)

    both = _alive(image.mask) & _alive(audio.mask)  # else the bias leaves together with the missing modality
    image_alone = _masked_softmax(image_logits, image.mask)
    audio_alone = _masked_softmax(audio_logits, audio.mask)
    if image.mask is not None:
        image_logits = image_logits.masked_fill(~image.mask[:, None, None], -math.inf)
    if audio.mask is not None:
        audio_logits = audio_logits.masked_fill(~audio.mask[:, None, None], -math.inf)
    image_weights, audio_weights = _marginals(image_logits, audio_logits, pair_bias)
    return torch.where(both, image_weights, image_alone), torch.where(both, audio_weights, audio_alone)


def _marginals(image_logits, audio_logits, pair_bias):
    """Marginals of the joint softmax under a bias (1 or B, 1 or H, S, T)."""
    image_blocks, image_within = _in_blocks(image_logits, pair_bias.shape[-2])
    audio_blocks, audio_within = _in_blocks(audio_logits, pair_bias.shape[-1])
    marginals = stream_marginals if is_exporting() else PairMarginals.apply
    weights = marginals(image_blocks, audio_blocks, pair_bias)
    return tuple(
        of_blocks if within is None else (of_blocks[..., None] * within).flatten(-2)
        for of_blocks, within in zip(weights, (image_within, audio_within), strict=True)
    )


def _in_blocks(logits, blocks):
    """(B, H, F, N) -> logits of whole blocks (B, H, F, blocks), -inf where no token is left; and the softmax
    in each (B, H, F, blocks, N / blocks), None where a block is a token.
    """
    if logits.shape[-1] == blocks:
        return logits, None
    logits = logits.unflatten(-1, (blocks, -1))
    dead = (logits == -math.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(dead, 0.0)
    return logits.logsumexp(-1).masked_fill(dead[..., 0], -math.inf), logits.softmax(-1)


def _bilinear(query, image, audio, pair_bias, scale):
    """Bilinear pairs: symmetric in the modalities, so stream over the shorter one."""
    pair_bias = _of_pairs(pair_bias, (image.key.shape[2], audio.key.shape[2]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    short, long = (Side(side.key.to(dtype), side.value.to(dtype), side.mask) for side in (image, audio))
    if short.key.shape[2] > long.key.shape[2]:
        short, long, pair_bias = long, short, None if pair_bias is None else pair_bias.mT
    return BilinearPairAttention.apply(query.to(dtype) * scale, *short, *long, pair_bias).to(query.dtype)


def _bilinear_weights(query, image, audio, pair_bias, scale):
    """Marginals of bilinear pairs: attention over pairs whose values are the indicators of their tokens."""
    B, H, I, A = *image.key.shape[:3], audio.key.shape[2]
    kind = dict(dtype=query.dtype, device=query.device)
    image_value = torch.cat([torch.eye(I, **kind), torch.ones(I, A, **kind)], 1).expand(B, H, -1, -1)
    audio_value = torch.cat([torch.ones(A, I, **kind), torch.eye(A, **kind)], 1).expand(B, H, -1, -1)
    image, audio = Side(image.key, image_value, image.mask), Side(audio.key, audio_value, audio.mask)
    return _bilinear(query, image, audio, pair_bias, scale).split([I, A], -1)


# --- triton, xformers ---------------------------------------------------------------------------------------


def _triton(query, image, audio, pair_bias, scale, interaction):
    inputs = query, *image[:2], *audio[:2], image.mask, audio.mask, pair_bias, scale
    if is_differentiating():
        return PairAttention.apply(*inputs)  # which alone costs as much as the launch
    return torch.ops.avfuse.pair_attention(*inputs)


def _xformers(query, image, audio, pair_bias, scale, interaction):
    if pair_bias is not None:
        raise ValueError("backend='xformers' has no pair bias, got pair_bias")
    return _xformers_attention(query, *image, scale) + _xformers_attention(query, *audio, scale)


def _xformers_attention(query, key, value, mask, scale):
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:  # as a bias, whose memory must be a multiple of 8 wide
        B, H, F, N = *query.shape[:3], key.shape[2]
        bias = query.new_zeros(B, H, F, N + -N % 8)[..., :N]
        bias = bias.masked_fill_(~_attended(mask), -math.inf)
    tensors = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, H, width)
    try:
        output = memory_efficient_attention(*tensors, attn_bias=bias, scale=scale)
    except NotImplementedError as error:
        raise ValueError(
            f"backend='xformers' has no operator for query of {query.dtype} on {query.device}: {error}"
        ) from error
    return _zero_where_dead(output.transpose(1, 2), _alive(mask))


# --- which backend runs -------------------------------------------------------------------------------------


def select_backend(
    backend: str | None = None,
    query: Tensor | None = None,
    value: Tensor | None = None,
    interaction: str = "additive",
) -> str:
    """The backend that `pair_attention` runs for these inputs when `backend` is requested: the one place
    where this is decided. None is "triton" for what its kernels can do on CUDA, and "torch" for all else; and
    for export, whose graph then holds plain operators alone, which run where avfuse is not.

    Raises:
        ValueError: the backend is unknown, or cannot run these inputs here.
    """
    if backend is None:
        on_cuda = query is not None and query.is_cuda and not is_exporting()
        return "triton" if on_cuda and not _triton_limit(query, value, interaction) else "torch"
    check_choice("backend", backend, BACKENDS)
    limit = None
    if backend == "triton":
        limit = _triton_limit(query, value, interaction)
    elif backend == "xformers":
        limit = _xformers_limit(interaction)
    if limit:
        raise ValueError(f"backend={backend!r} {limit}")
    return backend


def _triton_limit(query, value, interaction) -> str | None:
    """Why the kernels cannot run; None if they can."""
    if interaction != "additive":
        return f"runs additive pairs only, got interaction={interaction!r}"
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if query is None:
        return None
    if query.dtype not in TRITON_DTYPES:
        return f"takes float32, float16 or bfloat16, got query of {query.dtype}"
    key_width, value_width = query.shape[-1], value.shape[-1]
    if max(key_width, value_width) > TRITON_WIDTH:
        return f"takes key and value widths up to {TRITON_WIDTH} per head, got {key_width} and {value_width}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # anywhere, slowly
    if not query.is_cuda:
        return f"runs on CUDA, got query on {query.device} (TRITON_INTERPRET=1 lets tests run it anywhere)"
    if not runs_kernels(query.device):
        return f"needs an NVIDIA GPU of compute capability 8.0 or above, got {query.device}"
    return None


@torch.compiler.assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether this CUDA device is one the kernels are made for."""
    try:
        return _is_capable(device)
    except (RuntimeError, AssertionError):  # a fake tensor, on a GPU that is not there
        return False


@functools.cache  # asking CUDA at each call would cost as much as a launch
def _is_capable(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def _xformers_limit(interaction) -> str | None:
    if interaction != "additive":
        return f"runs additive pairs only, got interaction={interaction!r}"
    if not HAS_XFORMERS:
        return "needs the package xformers: pip install 'avfuse[xformers]'"
    return None


# --- masks -------------------------------------------------------------------------------------------------


def _alive(mask):
    """Which rows of the batch have a token of this modality left, (B, 1, 1, 1); True without a mask."""
    return True if mask is None else mask.any(1)[:, None, None, None]


def _attended(mask):
    """The mask as attention takes it, (B, 1, 1, N); where it leaves nothing, it leaves all."""
    return mask[:, None, None] | ~_alive(mask)


def _without_dead(side: Side) -> Side:
    """Zeros in the place of a modality without any token left: what a clip lacks may hold NaN."""
    alive = _alive(side.mask)
    key, value = (None if x is None else _zero_where_dead(x, alive) for x in side[:2])
    return Side(key, value, side.mask)


def _zero_where_dead(tensor, alive):
    return tensor if alive is True else torch.where(alive, tensor, 0.0)


def _masked_softmax(logits, mask):
    if mask is None:
        return logits.softmax(-1)
    return _zero_where_dead(logits.masked_fill(~_attended(mask), -math.inf).softmax(-1), _alive(mask))


def _four_dimensional(pair_bias):
    return None if pair_bias is None else pair_bias[(None,) * (4 - pair_bias.ndim)]


def _of_pairs(pair_bias, tokens):
    """(..., S, T) -> (..., 1 or I, 1 or A): an entry for each pair where several serve blocks."""
    if pair_bias is None:
        return None
    for dim, number in zip((-2, -1), tokens, strict=True):
        size = pair_bias.shape[dim]
        if size not in (1, number):
            pair_bias = pair_bias.repeat_interleave(number // size, dim)
    return pair_bias


# --- the public edge ----------------------------------------------------------------------------------------


def _check_tokens(**tensors):
    """Checks query, image_key, audio_key and, where given, image_value, audio_value."""
    query = tensors["query"]
    for name, tensor in tensors.items():
        check_tensor(name, tensor, "floating point")
        if tensor.ndim != 4 or 0 in tensor.shape[1:]:
            letters = {"query": "F, K", "image_key": "N, K", "audio_key": "N, K"}.get(name, "N, V")
            raise ValueError(
                f"{name} must be (B, H, {letters}) with no empty dimension, got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
        if tensor.shape[:2] != query.shape[:2]:
            sizes, shape = tuple(query.shape[:2]), tuple(tensor.shape)
            raise ValueError(
                f"{name} must have the batch size and heads of query, {sizes}, got shape {shape}"
            )
        if name.endswith("key") and tensor.shape[3] != query.shape[3]:
            raise ValueError(f"{name} must have the width of query, {query.shape[3]}, got {tensor.shape[3]}")
    if "image_value" not in tensors:
        return
    for name in "image", "audio":
        key_tokens, value_tokens = (tensors[f"{name}_{part}"].shape[2] for part in ("key", "value"))
        if value_tokens != key_tokens:
            raise ValueError(f"{name}_value has {value_tokens} tokens, {name}_key has {key_tokens}")
    image_width, audio_width = tensors["image_value"].shape[3], tensors["audio_value"].shape[3]
    if image_width != audio_width:
        raise ValueError(f"audio_value has width {audio_width}, image_value has {image_width}")


def _check_options(query, image, audio, pair_bias, scale, interaction):
    for name, side in ("image_mask", image), ("audio_mask", audio):
        check_mask(name, side.mask, (query.shape[0], side.key.shape[2]), query.device)
    if pair_bias is not None:
        check_tensor("pair_bias", pair_bias, "floating point", device=query.device)
        pairs, shape = (*query.shape[:2], image.key.shape[2], audio.key.shape[2]), tuple(pair_bias.shape)
        sizes = list(zip(reversed(shape), reversed(pairs), strict=False))
        in_blocks = all(size > 0 and full % size == 0 for size, full in sizes[:2])
        if len(shape) > 4 or not in_blocks or any(size not in (1, full) for size, full in sizes[2:]):
            raise ValueError(
                f"pair_bias must be broadcastable to {pairs}, or have sizes in the place of the last two that"
                f" divide them, got shape {shape}"
            )
    if scale is not None and not is_number(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    check_choice("interaction", interaction, tuple(PAIRS))
