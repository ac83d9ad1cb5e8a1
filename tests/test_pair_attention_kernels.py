"""The Triton kernels of pair_attention against float64: on the GPU where there is one, else in Triton's
interpreter. With -m gpu also what only a GPU shows: bfloat16, tf32, memory, repetition, graphs, large offsets.
"""

import functools
import itertools
import math
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from avfuse.kernels import biased_pair_attention as biased_kernels
from avfuse.kernels import pair_attention as kernels
from avfuse.ops.pair_attention import pair_attention, select_backend

INF = math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = ("query", "image_key", "image_value", "audio_key", "audio_value")
KEYS = ("image_key", "audio_key")
AXES = {"query": "K", "image_key": "IK", "image_value": "IV", "audio_key": "AK", "audio_value": "AV"}
AXES |= {"image_mask": "I", "audio_mask": "A", "pair_bias": "IA", "output": "V"}  # the last dimensions

OPTIONS = {
    "dtype": (torch.float32, torch.float16),
    "F": (1, 5, 16, 33),
    "I": (1, 7, 64, 65, 130),
    "A": (1, 3, 33, 96, 129),
    "K": (3, 16, 64),
    "V": (4, 64, 80),
    "masks": (None, "random", "dead"),
    "bias": (None, "own", "shared", "table", "image", "audio", "row, column", "few pairs", "opposed", "no pair"),
    "magnitude": (1.0, 60.0, 3000.0),
    "layout": ("contiguous", "projections", "strided"),
    "splits": (1, 2, 4),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel is given to fill holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **options):
        tensor = new_empty(*args, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def pairwise(options, count, seed=0):
    """`count` cases in which every two values of two options meet."""
    pick, cases = random.Random(seed), []
    wanted = {
        frozenset({(x, i), (y, j)})
        for x, y in itertools.combinations(options, 2)
        for i, j in itertools.product(options[x], options[y])
    }
    while len(cases) < count:
        drawn = [{name: pick.choice(values) for name, values in options.items()} for _ in range(60)]
        pairs = [{frozenset(pair) for pair in itertools.combinations(case.items(), 2)} for case in drawn]
        best = max(range(60), key=lambda n: len(pairs[n] & wanted))
        wanted -= pairs[best]
        cases.append(drawn[best])
    assert not wanted, f"{count} cases leave {len(wanted)} pairs of options untested"
    return cases


def name_of(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


# --- cases --------------------------------------------------------------------------------------------------


def make(F=3, I=5, A=4, K=6, V=7, *, B=3, H=2, dtype=torch.float32, magnitude=1.0, device=DEVICE):
    """Inputs by name whose logits have about the given standard deviation."""
    shapes = {"query": (F, K), "image_key": (I, K), "image_value": (I, V)}
    shapes |= {"audio_key": (A, K), "audio_value": (A, V)}
    tensors = {name: torch.randn(B, H, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in "image_key", "audio_key":
        tensors[name] *= magnitude
    return {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}


def bias_of(kind, B, H, tensors, magnitude, dtype):
    """A bias (B or 1, H or 1, I or 1, A or 1) of about the size of the logits."""
    (I, A), K = (tensors[name].shape[2] for name in ("image_key", "audio_key")), tensors["query"].shape[-1]
    shapes = {"own": (B, H, I, A), "shared": (1, H, I, A), "table": (1, 1, I, A)}
    shapes |= {"image": (B, 1, I, 1), "audio": (1, H, 1, A)}
    bias = magnitude * torch.randn(shapes.get(kind, (B, H, I, A)), device=DEVICE)
    if kind == "row, column":
        bias[:, :, 0] = bias[..., -1] = -INF
    elif kind == "few pairs":
        bias.masked_fill_(torch.rand(bias.shape, device=DEVICE) < 0.97, -INF)
    elif kind == "opposed":  # the first query is left with the pairs that it would look at least
        image, audio = (tensors[name].double() @ tensors["query"][:, :, 0, :, None].double() for name in KEYS)
        logits = (image + audio.mT) * K**-0.5
        bias.masked_fill_(logits > logits.flatten(-2).quantile(0.1, -1)[..., None, None], -INF)
    elif kind == "no pair":
        bias[0] = -INF
    return bias.to(dtype)


def masks_of(kind, B, I, A):
    """About 60 % of the tokens; with "dead", clip 0 has no image, clip 1 no sound, clip 2 neither, clip 3 both."""
    if kind is None:
        return {}
    masks = {"image_mask": torch.rand(B, I) < 0.6, "audio_mask": torch.rand(B, A) < 0.6}
    for mask in masks.values():
        mask[:, -1] = True
    if kind == "dead":
        masks["image_mask"][[0, 2]] = masks["audio_mask"][[1, 2]] = False
    return {name: mask.to(DEVICE) for name, mask in masks.items()}


def laid_out(tensor, layout):
    if layout == "projections":  # (B, N, H, width) in memory, as chunk and transpose leave it
        return torch.cat([tensor, tensor], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : tensor.shape[-1]]
    if layout == "strided":  # nothing adjacent, and NaN in between
        wide = tensor.new_full((*tensor.shape[:2], 2 * tensor.shape[2], 2 * tensor.shape[3]), math.nan)
        wide[:, :, ::2, ::2] = tensor
        return wide[:, :, ::2, ::2]
    return tensor


def run(tensors, output_grad, *, attend=pair_attention, dtype=None, **options):
    """Output and gradients by name."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    output = attend(**leaves, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), output_grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def plain(
    query, image_key, image_value, audio_key, audio_value, pair_bias=None, image_mask=None, audio_mask=None
):
    """Ordinary PyTorch in the dtype of the inputs: the error that the kernels are measured against."""
    sides = []
    for key, value, mask in (image_key, image_value, image_mask), (audio_key, audio_value, audio_mask):
        logits = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:  # a modality that is missing becomes tokens of 0
            alive = mask.any(1)[:, None, None, None]
            logits = torch.where(alive, logits, 0.0).masked_fill(~(mask[:, None, None] | ~alive), -INF)
            value = torch.where(alive, value, 0.0)
            if pair_bias is not None:
                pair_bias = torch.where(alive, pair_bias, 0.0)
        sides.append((logits, value))
    (image_logits, image_value), (audio_logits, audio_value) = sides
    if pair_bias is None:
        return image_logits.softmax(-1) @ image_value + audio_logits.softmax(-1) @ audio_value
    logits = image_logits[..., None] + audio_logits[..., None, :] + pair_bias[:, :, None].to(query.dtype)
    none_left = (logits == -INF).all((-2, -1), keepdim=True)
    weights = logits.masked_fill(none_left, 0.0).flatten(-2).softmax(-1).view_as(logits)
    weights = weights.masked_fill(none_left, 0.0)
    return weights.sum(-1) @ image_value + weights.sum(-2) @ audio_value


def usual_errors(tensors, truth, output_grad, **options):
    """The largest errors of `plain` by name, over some orders of what it sums: at large logits the error of one
    order is a draw of luck. Where plain float16 overflows, it counts for nothing.
    """
    sizes = dict(zip("KIVA", (*tensors["image_key"].shape[:1:-1], *tensors["audio_value"].shape[:1:-1]), strict=True))
    errors = dict.fromkeys(truth, 0.0)
    for _ in range(8):
        orders = {letter: torch.randperm(size, device=DEVICE) for letter, size in sizes.items()}
        permuted, true = (
            {name: reorder(name, x, orders) for name, x in group.items()} for group in ({**tensors, **options}, truth)
        )
        leaves = {name: permuted.pop(name) for name in tensors}
        usual = run(leaves, reorder("output", output_grad, orders), attend=plain, **permuted)
        for name, tensor in usual.items():
            error = (tensor.double() - true[name]).abs().max().item()
            errors[name] = max(errors[name], error if math.isfinite(error) else 0.0)
    return errors


def reorder(name, tensor, orders):
    for dim, letter in enumerate(reversed(AXES[name]), 1):
        if tensor.shape[-dim] > 1:
            tensor = tensor.index_select(-dim, orders[letter])
    return tensor


def cancellation(query, image_key, image_value, audio_key, audio_value, pair_bias, output_grad):
    """What a sum of weights times gradients consists of, at most: where a single pair has all the weight it is 0,
    as differences of equal numbers, which marginals are known for to float32 only.
    """
    image, audio = ((output_grad @ value.mT).abs().max().item() for value in (image_value, audio_value))
    largest, scale = 2 * (image + audio), query.shape[-1] ** -0.5
    queries, q = query.shape[:3].numel(), query.abs().max().item()
    keys = image_key.abs().max().item() + audio_key.abs().max().item()
    return {
        "query": largest * keys * scale,
        "image_key": query.shape[2] * largest * q * scale,
        "audio_key": query.shape[2] * largest * q * scale,
        "pair_bias": queries * largest,
    }


def assert_accurate(ours, usual, truth, dtype, terms):
    """At most twice the error of plain PyTorch in the same dtype, plus eps * max|truth|, for each tensor, or
    the smallest number there is.
    """
    for name, true in truth.items():
        assert ours[name].dtype == dtype and ours[name].isfinite().all(), name
        error = (ours[name].double() - true).abs().max().item()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = 2 * usual[name] + torch.finfo(dtype).eps * true.abs().max().item() + smallest
        allowed += torch.finfo(torch.float32).eps * terms.get(name, 0.0)
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def check(monkeypatch, dtype, F, I, A, K, V, masks, bias, magnitude, layout, splits):
    B, H = (4, 1) if masks == "dead" else (2, 1) if bias in ("shared", "table", "no pair") else (1, 2)
    force_splits(monkeypatch, splits)
    tensors = make(F, I, A, K, V, B=B, H=H, dtype=dtype, magnitude=magnitude)
    if bias:
        tensors["pair_bias"] = bias_of(bias, B, H, tensors, magnitude, dtype)
    options = masks_of(masks, B, I, A)
    output_grad = torch.randn(B, H, F, V, device=DEVICE).to(dtype)
    truth = run(tensors, output_grad, dtype=torch.float64, backend="reference", **options)
    usual = usual_errors(tensors, truth, output_grad, **options)
    terms = cancellation(**tensors, output_grad=output_grad) if bias else {}
    tensors = {name: laid_out(tensor, layout) for name, tensor in tensors.items()}
    ours = run(tensors, laid_out(output_grad, layout), backend="triton", **options)
    assert_accurate(ours, usual, truth, dtype, terms)


def force_splits(monkeypatch, splits):
    """Divides the tokens among this many programs, however few they are. The interpreter takes large tiles of
    pairs: its time goes by tiles.
    """
    settings, biased_settings = kernels.settings, biased_kernels.settings
    usual = {} if DEVICE == "cuda" else dict(BLOCK_N=64)
    large = {} if DEVICE == "cuda" else dict(BLOCK_N=128, BLOCK_F=32)
    monkeypatch.setattr(kernels, "settings", lambda *sizes: {**settings(*sizes), **usual, "SPLITS": splits})
    monkeypatch.setattr(biased_kernels, "settings", lambda *sizes: {**biased_settings(*sizes), **large})


@pytest.mark.parametrize("case", pairwise(OPTIONS, 100), ids=name_of)
def test_output_and_gradients(monkeypatch, case):
    check(monkeypatch, **case)
