"""The Triton kernels as operators of torch: what autograd, compilation, export and FLOP counters see of them.

    avfuse::pair_attention            tensors, masks, bias -> output (B, H, F, V)
    avfuse::pair_attention_backward   output_grad, the same -> gradients
    avfuse::residual_norm             tokens, update, context, weight, bias -> norm [, total]
    avfuse::residual_norm_backward    gradients of both, total, context, weight -> gradients

An operator is opaque: kernels are imported and launched only when it runs on real tensors.
"""

import functools

import torch
from torch.utils.flop_counter import register_flop_formula

# Programs of the backward of residual_norm: PROGRAMS, or fewer, so that each has TOKENS_OF_PROGRAM tokens.
# Each leaves one partial sum, so their number is the same on every card: equal inputs give equal bits.
PROGRAMS, TOKENS_OF_PROGRAM = 256, 8


def define(*schemas: str) -> None:
    """Declares operators of avfuse by their names and types."""
    for schema in schemas:
        name, _, types = schema.partition("(")
        torch.library.define(f"avfuse::{name}", f"({types}", tags=torch.Tag.pt2_compliant_tag)


def once_differentiable(operator: str, needs: str):
    """Decorates the backward of an autograd.Function: second derivatives raise, and say what has them.
    PyTorch's own decorator raises only where the gradient of the output requires one itself.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(f"second derivatives of {operator} need {needs}")
            return backward(ctx, *grads)

        return checked

    return decorate


ATTENDED = (
    "Tensor query, Tensor image_key, Tensor image_value, Tensor audio_key, Tensor audio_value,"
    " Tensor? image_mask, Tensor? audio_mask, Tensor? pair_bias, float scale"
)
define(
    f"pair_attention({ATTENDED}) -> Tensor",
    f"pair_attention_backward(Tensor output_grad, {ATTENDED}, bool bias_grad) -> Tensor[]",
    "residual_norm(Tensor tokens, Tensor? update, Tensor? context, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> Tensor[]",
    "residual_norm_backward(Tensor norm_grad, Tensor? total_grad, Tensor total, Tensor? context,"
    " Tensor? weight, float eps, ScalarType? update_dtype, bool sums_needed, SymInt programs) -> Tensor[]",
)


class PairAttention(torch.autograd.Function):
    """Saves its inputs only. (An autograd.Function around the operator costs half of what `register_autograd`
    does at each call.)
    """

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        return torch.ops.avfuse.pair_attention(*inputs)

    @staticmethod
    @once_differentiable("pair_attention", "backend='reference'")
    def backward(ctx, output_grad):
        bias_grad = ctx.needs_input_grad[7]
        inputs = (*ctx.saved_tensors, ctx.scale)
        grads = torch.ops.avfuse.pair_attention_backward(output_grad, *inputs, bias_grad)
        return *grads[:5], None, None, grads[5] if bias_grad else None, None


class ResidualNorm(torch.autograd.Function):
    """Returns the sum and the norms. Without an update the sum is `tokens` itself, and is returned all the
    same: so its gradient arrives here, and the kernel adds it to that of the norms, which autograd would do
    in a launch of its own.
    """

    @staticmethod
    def forward(ctx, tokens, update, context, weight, bias, eps, dtype):
        inputs = tokens, update, context, weight, bias, eps, dtype
        norm, *summed = torch.ops.avfuse.residual_norm(*inputs)
        total = summed[0] if summed else tokens
        ctx.save_for_backward(total, context, weight)
        ctx.eps, ctx.update_dtype = eps, None if update is None else update.dtype
        ctx.set_materialize_grads(False)
        return total, norm

    @staticmethod
    @once_differentiable("residual_norm", "float64, or tensors on a CPU")
    def backward(ctx, total_grad, norm_grad):
        total, context, weight = ctx.saved_tensors
        _, of_update, _, *of_weights = ctx.needs_input_grad[:5]
        update_dtype = ctx.update_dtype if of_update and ctx.update_dtype != total.dtype else None
        if norm_grad is None:  # only the sum was used
            return total_grad, total_grad if of_update else None, *[None] * 5
        tokens = norm_grad.shape[0] * norm_grad.shape[1]
        programs = max(1, min(PROGRAMS, tokens // TOKENS_OF_PROGRAM))
        inputs = norm_grad, total_grad, total, context, weight, ctx.eps
        grads = iter(
            torch.ops.avfuse.residual_norm_backward(*inputs, update_dtype, any(of_weights), programs)
        )
        tokens_grad = next(grads)
        update_grad = tokens_grad if of_update else None
        if update_dtype is not None:
            update_grad = next(grads)
        context_grad = None if context is None else next(grads)
        sums = next(grads).sum(0) if any(of_weights) else None
        weight_grads = (sums[i] if needed else None for i, needed in enumerate(of_weights))
        return tokens_grad, update_grad, context_grad, *weight_grads, None, None


# --- what runs ----------------------------------------------------------------------------------------------


@torch.library.impl("avfuse::pair_attention", ("cuda", "cpu"))
def pair_attention(*inputs):
    kernels, inputs = kernels_for(*inputs)
    return kernels.forward(*inputs)


@torch.library.impl("avfuse::pair_attention_backward", ("cuda", "cpu"))
def pair_attention_backward(output_grad, *inputs):
    kernels, inputs = kernels_for(*inputs)
    return kernels.backward(output_grad, *inputs)


def kernels_for(*inputs):
    """Those without a bias, for one of each pair, or for one of each block of pairs; and what they take."""
    from ..kernels import biased_pair_attention, blocked_pair_attention, pair_attention

    _, image_key, _, audio_key, *_, pair_bias, scale = inputs[:9]
    if pair_bias is None:
        return pair_attention, (*inputs[:7], scale)
    of_pairs = pair_bias.shape[2:] == (image_key.shape[2], audio_key.shape[2])
    return biased_pair_attention if of_pairs else blocked_pair_attention, inputs


@torch.library.impl("avfuse::residual_norm", ("cuda", "cpu"))
def residual_norm(*inputs):
    from ..kernels import residual_norm

    return residual_norm.forward(*inputs)


@torch.library.impl("avfuse::residual_norm_backward", ("cuda", "cpu"))
def residual_norm_backward(*inputs):
    from ..kernels import residual_norm

    return residual_norm.backward(*inputs)


# --- what is known without running --------------------------------------------------------------------------


@torch.library.register_fake("avfuse::pair_attention")
def _(query, image_key, image_value, *_):
    B, H, F, _ = query.shape
    return query.new_empty((B, F, H, image_value.shape[3])).transpose(1, 2)


@torch.library.register_fake("avfuse::pair_attention_backward")
def _(output_grad, *inputs):
    *tensors, image_mask, audio_mask, pair_bias, scale, bias_grad = inputs
    grads = [x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2) for x in tensors]
    return [*grads, pair_bias.new_empty(pair_bias.shape)] if bias_grad else grads


@torch.library.register_fake("avfuse::residual_norm")
def _(tokens, update, context, weight, bias, eps, dtype):
    B, N, D = tokens.shape
    norm = tokens.new_empty((B, N if context is None else context.shape[1] + N, D), dtype=dtype)
    if update is None:
        return [norm]
    return [norm, tokens.new_empty((B, N, D), dtype=torch.promote_types(tokens.dtype, update.dtype))]


@torch.library.register_fake("avfuse::residual_norm_backward")
def _(norm_grad, total_grad, total, context, weight, eps, update_dtype, sums_needed, programs):
    grads = [total.new_empty(total.shape)]
    if update_dtype is not None:
        grads.append(total.new_empty(total.shape, dtype=update_dtype))
    if context is not None:
        grads.append(context.new_empty(context.shape))
    if sums_needed:
        grads.append(total.new_empty((programs, 2, total.shape[2]), dtype=torch.float32))
    return grads


@register_flop_formula(torch.ops.avfuse.pair_attention)
def _(query, image_key, image_value, audio_key, *options, **_) -> int:
    """Logits (width K) and weighted values (width V) of every query and token; with a bias, two marginals of
    every query and pair, or block of pairs.
    """
    *_, pair_bias, _scale = options
    B, H, F, K = query
    I, A, V = image_key[2], audio_key[2], image_value[3]
    pairs = 0 if pair_bias is None else 2 * pair_bias[2] * pair_bias[3]
    return 2 * B * H * F * ((I + A) * (K + V) + pairs)


@register_flop_formula(torch.ops.avfuse.pair_attention_backward)
def _(output_grad, query, image_key, image_value, audio_key, *options, **_) -> int:
    """Logits and the gradients of queries and keys (width K), dP and the gradient of values (width V): what
    PyTorch counts for its own attention. That the kernel computes logits and dP more than once is left out.
    With a bias, weights and their gradients of every query and pair, or block of pairs, for each modality,
    and those of the bias.
    """
    *_, pair_bias, _scale, bias_grad = options
    B, H, F, K = query
    I, A, V = image_key[2], audio_key[2], image_value[3]
    pairs = 0 if pair_bias is None else (4 + 2 * bias_grad) * pair_bias[2] * pair_bias[3]
    return 2 * B * H * F * ((I + A) * (3 * K + 2 * V) + pairs)
