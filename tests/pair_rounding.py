"""What rounding may do to pair attention: output and gradients in float64, with random errors as large as
those of every step of a lower precision.

They depend on what is rounded, not on the order in which one processor happens to add. A sum of products is
off by the float32 rounding of the sum of their magnitudes, whatever they cancel to. A logit is off by the
rounding of the numbers that it is the sum of, and of the largest, which is subtracted from it. An operand of
a product that is cut to tf32 or rounded to float16 loses a random part of its last bit. The gradient of a
logit is off by the size of its terms, which are rounded before they cancel, also where a single pair has all
the weight.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = 2.0**-24  # the rounding of a number in the middle of a computation
TF32 = 2.0**-10  # what is lost where hardware cuts float32 to tf32's 10 bits after the point
UNDERFLOW = 2.0**-48  # what a weight may lose beside a pair bias: see kernels/biased_pair_attention.py
DRAWS = 8


@dataclass(frozen=True)
class Precision:
    """What the operands of a product lose, relative to their size: at least and at most."""

    inputs: tuple[float, float]
    computed: tuple[float, float]
    """Weights, and gradients of logits."""
    underflow: float
    on_gpu: bool

    @classmethod
    def of(cls, dtype: torch.dtype, *, tf32: bool, biased: bool, on_gpu: bool = False) -> "Precision":
        info = torch.finfo(dtype)
        nothing, cut, rounded = (0.0, 0.0), (0.0, TF32), (-info.eps / 2, info.eps / 2)
        underflow = UNDERFLOW if biased else info.smallest_normal * info.eps
        if dtype == torch.float32:
            lost = cut if tf32 else nothing
            return cls(lost, lost, underflow, on_gpu)
        in_tf32 = biased and dtype == torch.float16  # whose weights have too few exponents beside a bias
        return cls(nothing, cut if in_tf32 else rounded, underflow, on_gpu)


@dataclass
class Side:
    """One modality of one draw: (B, H, N, width), alive (B, 1, 1, 1), and (B, H, F, N) for each query."""

    key: Tensor
    value: Tensor
    alive: Tensor
    logits: Tensor
    grad: Tensor
    """Of the weights: the gradient of the output times the value."""


def largest_errors(
    tensors, truth, output_grad, precision, *, image_mask=None, audio_mask=None
) -> dict[str, float]:
    """By name, over some draws; `truth` is the exact output and gradients of `tensors`."""
    double = {name: tensor.double() for name, tensor in tensors.items()}
    errors = dict.fromkeys(truth, 0.0)
    for _ in range(DRAWS):
        drawn = draw(
            **double, masks=(image_mask, audio_mask), output_grad=output_grad.double(), precision=precision
        )
        for name, true in truth.items():
            errors[name] = max(errors[name], (drawn[name] - true).abs().max().item())
    return errors


def draw(
    query, image_key, image_value, audio_key, audio_value, pair_bias=None, *, masks, output_grad, precision
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    tokens = (image_key, image_value), (audio_key, audio_value)
    image, audio = (
        side_of(query, *own, mask, output_grad, precision) for own, mask in zip(tokens, masks, strict=True)
    )
    if pair_bias is not None:
        return draw_pairs(query, image, audio, pair_bias, output_grad, precision)
    image, audio = (
        draw_pairs(query, x, nothing_beside(x), None, output_grad, precision) for x in (image, audio)
    )
    results = {name: image[name] + audio[name] for name in ("output", "query")}
    for name, own in ("image", image), ("audio", audio):
        results |= {f"{name}_{part}": own[f"image_{part}"] for part in ("key", "value")}
    return results


def side_of(query, key, value, mask, output_grad, precision) -> Side:
    alive = key.new_ones((), dtype=torch.bool)
    if mask is not None:  # a modality that is missing becomes tokens of 0
        alive = mask.any(1)[:, None, None, None]
        key, value = torch.where(alive, key, 0.0), torch.where(alive, value, 0.0)
    logits = product(query, key.mT, precision.inputs, precision.inputs) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~(mask[:, None, None] | ~alive), -math.inf)
    return Side(key, value, alive, logits, product(output_grad, value.mT, precision.inputs, precision.inputs))


def nothing_beside(side: Side) -> Side:
    """One token of 0, beside which the tokens of `side` are attended to alone."""
    of_queries = torch.zeros_like(side.grad[..., :1])
    key, value = (torch.zeros_like(x[..., :1, :]) for x in (side.key, side.value))
    return Side(key, value, side.alive, of_queries, of_queries)


def draw_pairs(query, image: Side, audio: Side, pair_bias, output_grad, precision) -> dict[str, Tensor]:
    """Output and gradients by name of one softmax over all pairs, (B, H, F, I, A)."""
    both, scale = image.alive & audio.alive, query.shape[-1] ** -0.5
    logits = pairs(image.logits, audio.logits)
    I, A = logits.shape[-2:]
    bias = query.new_zeros(1, 1, 1, 1) if pair_bias is None else torch.where(both, pair_bias, 0.0)
    S, T = bias.shape[2:]
    bias = bias.repeat_interleave(I // S, 2).repeat_interleave(A // T, 3)
    logits = logits + bias[:, :, None]
    left = logits > -math.inf
    sizes = pairs(finite(image.logits).abs(), finite(audio.logits).abs()) + finite(bias).abs()[:, :, None]
    sizes = torch.where(left, sizes, 0.0)
    largest = sizes.amax((-2, -1), keepdim=True)
    logits = logits + noise(FLOAT32 * (sizes + largest))

    logits = logits.masked_fill(~left.any((-2, -1), keepdim=True), 0.0)
    exact = torch.where(left, logits.flatten(-2).softmax(-1).view_as(logits), 0.0)
    underflow = exact.clamp(max=precision.underflow)
    weights = lose(exact, precision.computed) - underflow * torch.rand_like(exact)

    # Of the logits: weights times what their gradients differ by from the mean, which is rounded as well
    image_mean, audio_mean = (
        (exact.sum(other) * side.grad).sum(-1, keepdim=True) for side, other in ((image, -1), (audio, -2))
    )
    image_grad, audio_grad = image.grad - image_mean, audio.grad - audio_mean
    grads, sizes = pairs(image_grad, audio_grad), pairs(image.grad.abs(), audio.grad.abs())
    shift = ((lose(exact, precision.computed) - exact) * grads).sum((-2, -1), keepdim=True)
    rounded = exact * (sizes + (exact * sizes).sum((-2, -1), keepdim=True))
    if pair_bias is None and not precision.on_gpu:
        # A weight of 1 is exact, and its own mean. A GPU's compiler may add in two orders in the two walks.
        rounded = rounded * ((1 - exact) / FLOAT32).clamp(max=1)
    logits_grad = weights * (grads - shift) + noise(FLOAT32 * rounded)
    if pair_bias is not None:  # each modality's part is weighted by itself
        apart = pairs(image_grad.abs(), audio_grad.abs())
        logits_grad = logits_grad + (lose(exact, precision.computed) - exact) * apart
        # The walk that divides by a sum of weights finds them anew, relative to bounds of other tiles, which
        # are rounded as the largest logit is: so a weight of 1 is off as well.
        weights = weights * (1 + noise(FLOAT32 * largest))

    inputs, computed = precision.inputs, precision.computed
    results = dict(output=0.0, query=0.0)
    for name, side, other in ("image", image, -1), ("audio", audio, -2):
        own_weights, own_grad = weights.sum(other), logits_grad.sum(other)  # (B, H, F, N)
        if pair_bias is not None:  # the parts of both modalities cancel at last
            own_grad = own_grad + noise(FLOAT32 * rounded.sum(other))
        results["output"] += product(own_weights, side.value, computed, inputs)
        results["query"] += product(own_grad, side.key, computed, inputs) * scale
        results[f"{name}_value"] = product(own_weights.mT, output_grad, computed, inputs) * side.alive
        results[f"{name}_key"] = product(own_grad.mT, query, computed, inputs) * scale * side.alive
    if pair_bias is not None:
        total, size = (
            (x.sum(2) * both)
            .unflatten(3, (T, -1))
            .unflatten(2, (S, -1))
            .sum((3, 5))
            .sum_to_size(pair_bias.shape)
            for x in (logits_grad, logits_grad.abs())
        )
        results["pair_bias"] = total + noise(FLOAT32 * size)
    return results


# --- errors -------------------------------------------------------------------------------------------------


def product(left: Tensor, right: Tensor, left_loss: tuple, right_loss: tuple) -> Tensor:
    """left @ right of operands that lose something, summed in float32."""
    return lose(left, left_loss) @ lose(right, right_loss) + noise(FLOAT32 * (left.abs() @ right.abs()))


def lose(x: Tensor, loss: tuple[float, float]) -> Tensor:
    """Each number without a random part of itself, between the two given."""
    least, most = loss
    return x if least == most == 0.0 else x * (1 - least - (most - least) * torch.rand_like(x))


def noise(size: Tensor) -> Tensor:
    return size * torch.randn_like(size)


def pairs(image: Tensor, audio: Tensor) -> Tensor:
    """(B, H, F, I), (B, H, F, A) -> (B, H, F, I, A)"""
    return image[..., None] + audio[..., None, :]


def finite(x: Tensor) -> Tensor:
    return torch.where(x == -math.inf, 0.0, x)
