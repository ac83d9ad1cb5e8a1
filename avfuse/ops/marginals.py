"""Marginals p_i and r_j of softmax_ij(s_i + t_j + b_ij): all that additive values need of a pair bias.

With u = exp(s - max s), w = exp(t - max t), and E = exp(b - max b), which the queries of a head share, they
are matrix products; no exponential is taken for each query and pair:

    p_i = u_i (E w)_i / Z                            r_j = w_j (E' u)_j / Z,           Z = sum_ij u_i E_ij w_j
    ds_i = p_i g_i + u_i (E (w h))_i / Z             dt_j = r_j h_j + w_j (E' (u g))_j / Z
    db_ij = E_ij sum_q (u_i g_i w_j + u_i w_j h_j) / Z

where g and h are the gradients of p and r, less their means sum_i p_i g_i and sum_j r_j h_j. E' is E
transposed; all but b and E belong to one query, and sum_q adds over the queries of a head.

The products underflow where b removes the pairs that hold the largest s_i and t_j. Each pair then loses less
than the smallest normal number, so a Z of at least `safe_sum` is right to rounding. Clips that have a query
below it are rare, and are streamed: exponentials of all logits, relative to the largest logit of a pair. So
the result is exact for any finite logits. Both ways go over chunks of image tokens. Only the bias gradient
has one entry per pair, and, where clips are streamed, the copy of their own bias.

    avfuse::pair_marginals            image and audio logits, bias -> p (B, H, F, I), r (B, H, F, A)
    avfuse::pair_marginals_backward   gradients of p and r, the same -> gradients

They are operators because the numbers decide which way a clip goes, and compilers do not see numbers.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from .operators import define, once_differentiable
from .streaming import bias_rows, chunks_of, finite, stream_marginals, stream_marginals_backward

define(
    "pair_marginals(Tensor image_logits, Tensor audio_logits, Tensor pair_bias) -> (Tensor, Tensor)",
    "pair_marginals_backward(Tensor image_grad, Tensor audio_grad, Tensor image_logits, Tensor audio_logits,"
    " Tensor pair_bias, bool bias_grad) -> Tensor[]",
)


class PairMarginals(torch.autograd.Function):
    """Image logits (B, H, F, I), audio logits (B, H, F, A) and a bias that broadcasts to (B, H, I, A) -> the
    marginals (B, H, F, I) and (B, H, F, A). -inf removes a token or a pair; without any pair they are 0.
    """

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.ops.avfuse.pair_marginals(*inputs)

    @staticmethod
    @once_differentiable("pair_attention", "backend='reference'")
    def backward(ctx, image_grad, audio_grad):
        bias_grad = ctx.needs_input_grad[2]
        grads = torch.ops.avfuse.pair_marginals_backward(
            image_grad, audio_grad, *ctx.saved_tensors, bias_grad
        )
        return *grads[:2], grads[2] if bias_grad else None


# --- what runs ----------------------------------------------------------------------------------------------


def pair_marginals(image_logits, audio_logits, pair_bias):
    products = Products(image_logits, audio_logits, pair_bias)
    p, r = products.p, products.r
    if (clips := products.lost) is not None:
        own_bias = bias_of(clips, pair_bias)
        p[clips], r[clips] = stream_marginals(image_logits[clips], audio_logits[clips], own_bias)
    return p, r


def pair_marginals_backward(image_grad, audio_grad, image_logits, audio_logits, pair_bias, bias_grad):
    products = Products(image_logits, audio_logits, pair_bias)
    p, r, u, w = products.p, products.r, products.u / products.total, products.w
    g = image_grad - (p * image_grad).sum(-1, keepdim=True)
    h = audio_grad - (r * audio_grad).sum(-1, keepdim=True)
    ug, wh = u * g, w * h

    image_logits_grad, audio_logits_grad = products.with_bias(ug, wh)
    image_logits_grad.mul_(u).addcmul_(p, g)
    audio_logits_grad.mul_(w).addcmul_(r, h)
    grads = [image_logits_grad, audio_logits_grad]
    if bias_grad:
        grads.append(u.new_zeros(pair_bias.shape))
        kept = "".join(letter for letter, size in zip("bhia", pair_bias.shape, strict=True) if size != 1)
        left, right = torch.cat([ug, u], 2), torch.cat([w, wh], 2)  # (B, H, 2 F, I) and (B, H, 2 F, A)
        for i, E in products.chunks():
            of_pairs = torch.einsum(f"bhfi,bhfa->{kept}", left[..., i], right)
            bias_rows(grads[2], i).add_(of_pairs.reshape(E.shape).mul_(E))
    if (clips := products.lost) is not None:
        own = (x[clips] for x in (image_grad, audio_grad, image_logits, audio_logits))
        streamed = stream_marginals_backward(*own, bias_of(clips, pair_bias), bias_grad)
        image_logits_grad[clips], audio_logits_grad[clips] = streamed[:2]
        if bias_grad and pair_bias.shape[0] == 1:
            grads[2] += streamed[2]
        elif bias_grad:
            grads[2][clips] = streamed[2]
    return [*grads[:2], grads[2].to(pair_bias.dtype)] if bias_grad else grads


torch.library.impl("avfuse::pair_marginals", "cpu", pair_marginals)
torch.library.impl("avfuse::pair_marginals_backward", "cpu", pair_marginals_backward)
# On a GPU, looking for lost clips would wait for it. Its Triton kernels do all but float64 and wide heads.
torch.library.impl("avfuse::pair_marginals", "cuda", stream_marginals)
torch.library.impl("avfuse::pair_marginals_backward", "cuda", stream_marginals_backward)


class Products:
    """u and p (B, H, F, I), w and r (B, H, F, A); Z as `total` (B, H, F, 1), or 1 where there is no pair; and
    the numbers of the clips that are `lost`, if any.
    """

    def __init__(self, image_logits, audio_logits, pair_bias):
        image_logits, audio_logits = image_logits.contiguous(), audio_logits.contiguous()
        image_top, audio_top = image_logits.amax(-1, keepdim=True), audio_logits.amax(-1, keepdim=True)
        self.bias = pair_bias
        self.bias_top = pair_bias.amax((-2, -1), keepdim=True).to(image_logits.dtype)
        self.u, self.w = (image_logits - finite(image_top)).exp_(), (audio_logits - finite(audio_top)).exp_()
        image, audio = self.with_bias(self.u, self.w)
        image, audio = image.mul_(self.u), audio.mul_(self.w)
        image_total, audio_total = image.sum(-1, keepdim=True), audio.sum(-1, keepdim=True)

        has_pairs = (image_top > -math.inf) & (audio_top > -math.inf) & (self.bias_top > -math.inf)
        lost = (has_pairs & (image_total < safe_sum(image_total.dtype))).flatten(1).any(1)
        self.lost = lost.nonzero().flatten() if lost.any() else None
        if self.lost is not None:
            self.u[self.lost] = 0  # else what they add to the gradient of a shared bias would be added twice

        # Both totals are Z. Each is rounded as what it divides, so that a single pair has p = r = 1.
        self.total = nonzero(image_total)
        self.p, self.r = image / self.total, audio / nonzero(audio_total)

    def with_bias(self, u, w):
        """(E w)_i and (E' u)_j for these u and w, (B, H, F, I) and (B, H, F, A)."""
        image, audio = torch.empty_like(self.u), torch.zeros_like(self.w)
        for i, E in self.chunks():  # einsum does not expand what broadcasts
            image[..., i] = torch.einsum("bhfa,bhia->bhfi", w, E)
            audio += torch.einsum("bhfi,bhia->bhfa", u[..., i], E)
        return image, audio

    def chunks(self):
        """Slices i of the image tokens, and their E (B or 1, H or 1, i or 1, A or 1)."""
        rows, row = self.bias.shape[2], self.bias[:, :, 0].numel()
        for i in [slice(None)] if rows == 1 else chunks_of(rows, row):  # one row is that of all image tokens
            yield i, (bias_rows(self.bias, i).to(self.u.dtype) - finite(self.bias_top)).exp_()


def safe_sum(dtype):
    """The least Z that is right to rounding: 2**27 pairs that each lose the smallest normal number lose one
    eps of it.
    """
    numbers = torch.finfo(dtype)
    return numbers.tiny / numbers.eps * 2**27


def nonzero(total):
    return total.masked_fill(total == 0, 1)


def bias_of(clips, pair_bias):
    return pair_bias if pair_bias.shape[0] == 1 else pair_bias[clips]


# --- what is known without running --------------------------------------------------------------------------


@torch.library.register_fake("avfuse::pair_marginals")
def _(image_logits, audio_logits, pair_bias):
    return image_logits.new_empty(image_logits.shape), audio_logits.new_empty(audio_logits.shape)


@torch.library.register_fake("avfuse::pair_marginals_backward")
def _(image_grad, audio_grad, image_logits, audio_logits, pair_bias, bias_grad):
    like = (image_logits, audio_logits, pair_bias)[: 2 + bias_grad]
    return [tensor.new_empty(tensor.shape) for tensor in like]


@register_flop_formula(torch.ops.avfuse.pair_marginals)
def _(image_logits, audio_logits, *_, **__) -> int:
    """Two products with E."""
    B, H, F, I = image_logits
    return 2 * B * H * F * 2 * I * audio_logits[3]


@register_flop_formula(torch.ops.avfuse.pair_marginals_backward)
def _(image_grad, audio_grad, image_logits, audio_logits, pair_bias, bias_grad, **_) -> int:
    """The same two and two more, and that of the bias, twice as wide."""
    B, H, F, I = image_logits
    return 2 * B * H * F * (4 + 2 * bias_grad) * I * audio_logits[3]
