"""Cross-attention of a few queries over every pair of one image token i and one audio token j, never storing
the pairs.

Additive pairs (paper Eq. 4-7) have keys k_i + k_j and values v_i + v_j, so the softmax over pairs factorizes:

    softmax_ij(q.k_i + q.k_j) = softmax_i(q.k_i) softmax_j(q.k_j)
    sum_ij p_i r_j (v_i + v_j) = sum_i p_i v_i + sum_j r_j v_j

Exact dense interactions are the sum of two cross-attentions that share a query: cost I + A, not I * A.
With a pair bias b_ij the weights no longer factorize, but additive values still need only the two marginals
of the joint softmax. Bilinear pairs (keys k_i * k_j, values v_i * v_j) do real work per pair. Both go over
chunks of pairs.

Shapes: B batch, H heads, F fusion tokens (queries), I image tokens, A audio tokens, K and V widths per head.
"""

import functools
import importlib.util
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_mask, is_number, kind_of, without_autocast
from .marginals import PairMarginals
from .registered import PairAttention
from .streaming import BilinearPairAttention

INTERACTIONS = ("additive", "bilinear")
BACKENDS = ("triton", "torch", "xformers", "reference")
HAS_TRITON, HAS_XFORMERS = (importlib.util.find_spec(name) is not None for name in ("triton", "xformers"))
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_WIDTH = 128  # a tile of wider keys or values does not fit a multiprocessor's registers


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
            is then 0.
        pair_bias: added to the logit of pair (i, j), broadcastable to (B, H, I, A), differentiable; -inf
            masks a pair. A query with no pair left gets output 0 and gradients 0.
        scale: of the logits; default K**-0.5.
        interaction: "additive" (k_i + k_j, v_i + v_j) or "bilinear" (k_i * k_j, v_i * v_j).
        backend: None picks "triton" on CUDA where it can, else "torch" (see `select_backend`); "xformers" has
            no pair bias; "reference" materializes every pair.

    Returns:
        (B, H, F, V), in the dtype of `query`. Second derivatives need backend="reference".

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong, or the backend that is
        missing.
    """
    _check_tokens(
        query=query,
        image_key=image_key,
        audio_key=audio_key,
        image_value=image_value,
        audio_value=audio_value,
    )
    _check_options(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale, interaction)
    backend = select_backend(backend, query, image_value, interaction)
    attend = {"triton": _triton, "torch": _attend, "xformers": _xformers, "reference": reference}[backend]
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with without_autocast(query.device):
        tensors = (query, image_key, image_value, audio_key, audio_value)
        return attend(*tensors, image_mask, audio_mask, _four_dimensional(pair_bias), scale, interaction)


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
    _check_options(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale, interaction)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    pair_bias = _four_dimensional(pair_bias)
    with without_autocast(query.device):
        if interaction == "bilinear":
            return _bilinear_weights(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale)
        weights = _additive_weights(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale)
        return weights[0].to(query.dtype), weights[1].to(query.dtype)


def select_backend(
    backend: str | None = None,
    query: Tensor | None = None,
    value: Tensor | None = None,
    interaction: str = "additive",
) -> str:
    """The backend that `pair_attention` runs for these inputs when asked for `backend`: the one place where
    this is decided. None is "triton" for what its kernels can do on CUDA, and "torch" for all else.

    Raises:
        ValueError: the backend is unknown, or cannot run these inputs here.
    """
    if backend is None:
        on_cuda = query is not None and query.is_cuda
        return "triton" if on_cuda and not _triton_lacks(query, value, interaction) else "torch"
    check_choice("backend", backend, BACKENDS)
    lacks = None
    if backend == "triton":
        lacks = _triton_lacks(query, value, interaction)
    elif backend == "xformers":
        lacks = _xformers_lacks(interaction)
    if lacks:
        raise ValueError(f"backend={backend!r} {lacks}")
    return backend


def _triton_lacks(query, value, interaction) -> str | None:
    """Why the kernels cannot run; None if they can."""
    if interaction != "additive":
        return f"runs additive pairs only, got interaction={interaction!r}"
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if query is None:
        return None
    if query.dtype not in TRITON_DTYPES:
        return f"takes float32, float16 or bfloat16, got query of {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > TRITON_WIDTH:
        widths = query.shape[-1], value.shape[-1]
        return f"takes key and value widths up to {TRITON_WIDTH} per head, got {widths[0]} and {widths[1]}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # anywhere, slowly
    if not query.is_cuda:
        return f"runs on CUDA, got query on {query.device} (TRITON_INTERPRET=1 lets tests run it anywhere)"
    if not _runs_kernels(query.device):
        return f"needs an NVIDIA GPU of compute capability 8.0 or above, got {query.device}"
    return None


@functools.cache  # asking CUDA at each call would cost as much as a launch
def _runs_kernels(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def _xformers_lacks(interaction) -> str | None:
    if interaction != "additive":
        return f"runs additive pairs only, got interaction={interaction!r}"
    if not HAS_XFORMERS:
        return "needs the package xformers: pip install 'avfuse[xformers]'"
    return None


# --- triton, xformers ---------------------------------------------------------------------------------------


def _triton(*inputs):
    *inputs, _interaction = inputs  # additive: `select_backend` saw to it
    if not torch.is_grad_enabled():  # the autograd.Function alone would cost as much as the launch
        return torch.ops.avfuse.pair_attention(*inputs)
    return PairAttention.apply(*inputs)


def _xformers(
    query,
    image_key,
    image_value,
    audio_key,
    audio_value,
    image_mask,
    audio_mask,
    pair_bias,
    scale,
    interaction,
):
    if pair_bias is not None:
        raise ValueError("backend='xformers' has no pair bias, got pair_bias")
    attended_image = _xformers_attention(query, image_key, image_value, image_mask, scale)
    return attended_image + _xformers_attention(query, audio_key, audio_value, audio_mask, scale)


def _xformers_attention(query, key, value, mask, scale):
    from xformers.ops import memory_efficient_attention

    bias, alive = None, _alive(mask)
    if mask is not None:  # as a bias, whose memory must be a multiple of 8 wide
        B, H, F, N = *query.shape[:3], key.shape[2]
        bias = query.new_zeros(B, H, F, N + -N % 8)[..., :N]
        bias = bias.masked_fill_(~(mask[:, None, None] | ~alive), -math.inf)
    tensors = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, H, width)
    try:
        output = memory_efficient_attention(*tensors, attn_bias=bias, scale=scale)
    except NotImplementedError as error:
        raise ValueError(
            f"backend='xformers' has no operator for query of {query.dtype} on {query.device}: {error}"
        ) from error
    return _zero_where_dead(output.transpose(1, 2), alive)


# --- reference: every pair is stored; the oracle of the tests and the slow row of the tables ----------------


def reference(
    query,
    image_key,
    image_value,
    audio_key,
    audio_value,
    image_mask,
    audio_mask,
    pair_bias,
    scale,
    interaction,
):
    """Paper Eq. 4-7 as written: form every pair token's key and value, one softmax over all of them."""
    combine = torch.add if interaction == "additive" else torch.mul
    image_alive, audio_alive = _alive(image_mask), _alive(audio_mask)  # (B, 1, 1, 1) or True
    image_value = _zero_where_dead(image_value, image_alive)
    audio_value = _zero_where_dead(audio_value, audio_alive)

    weights = reference_weights(
        query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale, interaction
    )
    value = combine(image_value[:, :, :, None], audio_value[:, :, None])  # (B, H, I, A, V)
    return torch.einsum("bhfij,bhijv->bhfv", weights, value)


def reference_weights(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale, interaction):
    """The joint softmax over all pairs, (B, H, F, I, A); a dead modality stands as equal null tokens."""
    combine = torch.add if interaction == "additive" else torch.mul
    image_alive, audio_alive = _alive(image_mask), _alive(audio_mask)
    image_key = _zero_where_dead(image_key, image_alive)
    audio_key = _zero_where_dead(audio_key, audio_alive)

    key = combine(image_key[:, :, :, None], audio_key[:, :, None])  # (B, H, I, A, K)
    logits = torch.einsum("bhfk,bhijk->bhfij", query, key) * scale
    if pair_bias is not None:
        pair_bias = pair_bias.to(logits.dtype).expand(-1, -1, *logits.shape[-2:])
        if image_mask is not None or audio_mask is not None:
            pair_bias = torch.where(torch.as_tensor(image_alive & audio_alive), pair_bias, 0.0)
        logits = logits + pair_bias[:, :, None]
    if image_mask is not None:
        logits = logits.masked_fill(
            ~(image_mask[:, None, None, :, None] | ~image_alive[..., None]), -math.inf
        )
    if audio_mask is not None:
        logits = logits.masked_fill(
            ~(audio_mask[:, None, None, None, :] | ~audio_alive[..., None]), -math.inf
        )
    none_left = (logits == -math.inf).all((-2, -1), keepdim=True)
    weights = logits.masked_fill(none_left, 0.0).flatten(-2).softmax(-1).view_as(logits)
    return weights.masked_fill(none_left, 0.0)


# --- torch: exact and without a pair tensor -----------------------------------------------------------------


def _attend(
    query,
    image_key,
    image_value,
    audio_key,
    audio_value,
    image_mask,
    audio_mask,
    pair_bias,
    scale,
    interaction,
):
    if interaction == "bilinear":
        return _bilinear(
            query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, scale
        )
    if pair_bias is None:
        attended_image = masked_attention(query, image_key, image_value, image_mask, scale)
        attended_audio = masked_attention(query, audio_key, audio_value, audio_mask, scale)
        return attended_image + attended_audio
    image_weights, audio_weights = _additive_weights(
        query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale
    )
    image_value, audio_value = image_value.to(image_weights.dtype), audio_value.to(audio_weights.dtype)
    return (image_weights @ image_value + audio_weights @ audio_value).to(query.dtype)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Ordinary cross-attention (B, H, F, K) x (B, H, N, K) -> (B, H, F, V), one half of the identity.

    `mask` is (B, N) bool, True = attend; where it leaves no token, the output is 0 and so are the gradients.
    """
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    alive = _alive(mask)
    mask = mask[:, None, None] | ~alive  # (B, 1, 1, N)
    return _zero_where_dead(
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), alive
    )


def masked_attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The weights (B, H, F, N) of `masked_attention`, each row summing to 1, or 0 where no token is left."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _masked_softmax(query @ key.mT * scale, mask)


def _additive_weights(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale):
    """Marginals (B, H, F, I) and (B, H, F, A) of the joint softmax, in float32 or better."""
    query = query.to(torch.promote_types(query.dtype, torch.float32)) * scale
    image_logits = query @ image_key.to(query.dtype).mT
    audio_logits = query @ audio_key.to(query.dtype).mT
    if pair_bias is None:
        return _masked_softmax(image_logits, image_mask), _masked_softmax(audio_logits, audio_mask)
    if image_mask is None and audio_mask is None:
        return PairMarginals.apply(image_logits, audio_logits, pair_bias)

    both = _alive(image_mask) & _alive(audio_mask)  # else the bias leaves together with the missing modality
    image_alone = _masked_softmax(image_logits, image_mask)
    audio_alone = _masked_softmax(audio_logits, audio_mask)
    if image_mask is not None:
        image_logits = image_logits.masked_fill(~image_mask[:, None, None], -math.inf)
    if audio_mask is not None:
        audio_logits = audio_logits.masked_fill(~audio_mask[:, None, None], -math.inf)
    image_weights, audio_weights = PairMarginals.apply(image_logits, audio_logits, pair_bias)
    return torch.where(both, image_weights, image_alone), torch.where(both, audio_weights, audio_alone)


def _bilinear(
    query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, scale
):
    """Bilinear pairs: symmetric in the modalities, so stream over the shorter one."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    image = (image_key.to(dtype), image_value.to(dtype), image_mask)
    audio = (audio_key.to(dtype), audio_value.to(dtype), audio_mask)
    scaled = query.to(dtype) * scale
    if image_key.shape[2] <= audio_key.shape[2]:
        output = BilinearPairAttention.apply(scaled, *image, *audio, pair_bias)
    else:
        bias = None if pair_bias is None else pair_bias.mT
        output = BilinearPairAttention.apply(scaled, *audio, *image, bias)
    return output.to(query.dtype)


def _bilinear_weights(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale):
    """Marginals of bilinear pairs: the attention over pairs whose values are the indicators of their
    tokens.
    """
    B, H, I, A = *image_key.shape[:3], audio_key.shape[2]
    kind = dict(dtype=query.dtype, device=query.device)
    image_value = torch.cat([torch.eye(I, **kind), torch.ones(I, A, **kind)], 1).expand(B, H, -1, -1)
    audio_value = torch.cat([torch.ones(A, I, **kind), torch.eye(A, **kind)], 1).expand(B, H, -1, -1)
    weights = _bilinear(
        query, image_key, image_value, audio_key, audio_value, image_mask, audio_mask, pair_bias, scale
    )
    return weights.split([I, A], -1)


# --- masks -------------------------------------------------------------------------------------------------


def _alive(mask):
    """Which rows of the batch have a token of this modality left, (B, 1, 1, 1); True without a mask."""
    return True if mask is None else mask.any(1)[:, None, None, None]


def _zero_where_dead(tensor, alive):
    return tensor if alive is True else torch.where(alive, tensor, 0.0)


def _masked_softmax(logits, mask):
    if mask is None:
        return logits.softmax(-1)
    alive = _alive(mask)
    return _zero_where_dead(logits.masked_fill(~(mask[:, None, None] | ~alive), -math.inf).softmax(-1), alive)


def _four_dimensional(pair_bias):
    return None if pair_bias is None else pair_bias[(None,) * (4 - pair_bias.ndim)]


# --- the public edge ----------------------------------------------------------------------------------------


def _check_tokens(**tensors):
    """Checks query, image_key, audio_key and, where given, image_value, audio_value."""
    # Each attribute is asked for once: this is paid in every layer of every step.
    query = tensors["query"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        if len(shape) != 4 or 0 in (shape[1], shape[2], shape[3]):
            letters = (
                "(B, H, F, K)" if name == "query" else f"(B, H, N, {'K' if name.endswith('key') else 'V'})"
            )
            raise ValueError(f"{name} must be {letters} with no empty dimension, got shape {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor is query:  # the first
            dtype, device, B, H = tensor.dtype, tensor.device, shape[0], shape[1]
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of query, {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}")
        if shape[0] != B or shape[1] != H:
            raise ValueError(
                f"{name} must have the batch size and heads of query, {(B, H)}, got shape {tuple(shape)}"
            )
    for name in ("image_key", "audio_key"):
        if tensors[name].shape[3] != query.shape[3]:
            raise ValueError(
                f"{name} must have the width of query, {query.shape[3]}, got {tensors[name].shape[3]}"
            )
    if "image_value" not in tensors:
        return
    for key, value in ("image_key", "image_value"), ("audio_key", "audio_value"):
        if tensors[value].shape[2] != tensors[key].shape[2]:
            raise ValueError(
                f"{value} has {tensors[value].shape[2]} tokens, {key} has {tensors[key].shape[2]}"
            )
    image_width, audio_width = tensors["image_value"].shape[3], tensors["audio_value"].shape[3]
    if image_width != audio_width:
        raise ValueError(f"audio_value has width {audio_width}, image_value has {image_width}")


def _check_options(query, image_key, audio_key, image_mask, audio_mask, pair_bias, scale, interaction):
    for name, mask, key in ("image_mask", image_mask, image_key), ("audio_mask", audio_mask, audio_key):
        check_mask(name, mask, (key.shape[0], key.shape[2]), query.device)
    if pair_bias is not None:
        pairs = (*query.shape[:2], image_key.shape[2], audio_key.shape[2])
        if not isinstance(pair_bias, Tensor) or not pair_bias.is_floating_point():
            raise ValueError(f"pair_bias must be a floating point tensor, got {kind_of(pair_bias)}")
        if pair_bias.device != query.device:
            raise ValueError(
                f"pair_bias must be on the device of query, {query.device}, got {pair_bias.device}"
            )
        sizes = zip(reversed(pair_bias.shape), reversed(pairs), strict=False)
        if pair_bias.ndim > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(
                f"pair_bias must be broadcastable to {pairs}, got shape {tuple(pair_bias.shape)}"
            )
    if scale is not None and not is_number(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    check_choice("interaction", interaction, INTERACTIONS)
