"""pair_attention against every pair written out: output and each gradient by name, at odd sizes, with dead
modalities, extreme logits and any strides; its memory, and what it refuses.
"""

import math
import operator
import random
import sys
from functools import partial
from itertools import product
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from avfuse.ops import marginals, streaming
from avfuse.ops import pair_attention as ops
from avfuse.ops.pair_attention import pair_attention, pair_attention_weights, select_backend

INF = math.inf
TOKENS = ("query", "image_key", "image_value", "audio_key", "audio_value")
PAIR = {"additive": operator.add, "bilinear": operator.mul}
both_interactions = pytest.mark.parametrize("interaction", PAIR)
both_backends = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(B=2, H=2, F=3, I=5, A=4, K=6, V=7, *, bias=None, keys=1.0, dtype=torch.float64):
    """Random inputs by name; `keys` multiplies the keys, and with them the logits; `bias` is a shape."""
    sizes = (F, K), (I, K), (I, V), (A, K), (A, V)
    shapes = {name: (B, H, *size) for name, size in zip(TOKENS, sizes, strict=True)}
    if bias is not None:
        shapes["pair_bias"] = bias
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: (x * keys if name.endswith("key") else x).to(dtype) for name, x in tensors.items()}


def mask_of(B, N, *, dead=(), full=()):
    """(B, N) bool with about a third of the tokens masked: all of them in the rows `dead`, none in `full`."""
    mask = torch.rand(B, N) < 0.6
    mask[:, torch.randint(N, ())] = True
    mask[list(full)], mask[list(dead)] = True, False
    return mask


def cut(pair_bias, kind):
    """Removes pairs from a bias of any shape."""
    wide = pair_bias[(None,) * (4 - pair_bias.ndim)]  # a view
    where = {"row": wide[:, :, -1], "column": wide[..., -1], "all pairs of the first clip": wide[0]}
    if kind in where:
        where[kind].fill_(-INF)
    elif kind == "half the pairs":
        pair_bias.masked_fill_(torch.rand(pair_bias.shape) < 0.5, -INF)


def run(tensors, *, attend=pair_attention, dtype=None, **options):
    """Output and gradients by name; the gradient of the output depends on its shape and dtype only."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    output = attend(**leaves, **options)
    output_grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output_grad = output_grad.to(tensors["query"].dtype).to(output.dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), output_grad)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def weights(tensors, **options):
    tokens = {name: tensor for name, tensor in tensors.items() if not name.endswith("value")}
    return pair_attention_weights(**tokens, **options)


def assert_close(ours, truth, tolerances):
    for name, tensor in truth.items():
        error = (ours[name].double() - tensor.double()).abs().max().item()
        assert error <= tolerances[name], f"{name} is off by {error:.2e}, allowed {tolerances[name]:.2e}"


# --- the truth ----------------------------------------------------------------------------------------------


def by_hand(tensors, image_mask, audio_mask, scale, interaction):
    """Output, image weights and audio weights in plain Python, one pair at a time."""
    query, image_key, image_value, audio_key, audio_value = (tensors[name].tolist() for name in TOKENS)
    (B, H, F, K), V, pair = tensors["query"].shape, tensors["image_value"].shape[-1], PAIR[interaction]
    I, A = len(image_key[0][0]), len(audio_key[0][0])
    results = [torch.zeros(B, H, F, n, dtype=torch.float64) for n in (V, I, A)]
    for b, h in product(range(B), range(H)):
        images = [(i, image_key[b][h][i], image_value[b][h][i]) for i in range(I) if image_mask[b, i]]
        audios = [(j, audio_key[b][h][j], audio_value[b][h][j]) for j in range(A) if audio_mask[b, j]]
        bias = tensors["pair_bias"].expand(B, H, I, A)[b, h].tolist() if "pair_bias" in tensors else None
        if interaction == "additive" and bool(images) != bool(audios):  # the other goes on alone
            nothing, bias = (None, [0.0] * K, [0.0] * V), None
            images, audios = images or [nothing], audios or [nothing]
        for f in range(F):
            terms = []
            for (i, image_k, image_v), (j, audio_k, audio_v) in product(images, audios):
                logit = scale * sum(map(operator.mul, query[b][h][f], map(pair, image_k, audio_k)))
                value = torch.tensor([*map(pair, image_v, audio_v)], dtype=torch.float64)
                terms.append((math.exp(logit + (bias[i][j] if bias else 0.0)), i, j, value))
            total = sum(weight for weight, *_ in terms)
            output, image_weights, audio_weights = (result[b, h, f] for result in results)
            for weight, i, j, value in terms if total else []:
                output += weight / total * value
                if i is not None:
                    image_weights[i] += weight / total
                if j is not None:
                    audio_weights[j] += weight / total
    return results


@both_backends
def test_numbers_worked_out_on_paper(backend):
    def column(*numbers):
        return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]

    tensors = {"query": column(1.0), "image_value": column(4.0, 8.0), "audio_value": column(3.0, 6.0)}
    additive = {**tensors, "image_key": column(0.0, math.log(3)), "audio_key": column(0.0, math.log(2))}
    bilinear = {**tensors, "image_key": column(0.0, 1.0), "audio_key": column(0.0, math.log(3))}
    no_last = torch.tensor([[0.0, 0.0], [0.0, -INF]])
    # 4 and 8 weigh 1/4 and 3/4, 3 and 6 weigh 1/3 and 2/3; then of pairs weighing 1, 2, 3, 6 the last is out
    assert pair_attention(**additive, backend=backend).item() == pytest.approx(7 + 5)
    assert pair_attention(**additive, pair_bias=no_last, backend=backend).item() == pytest.approx(6 + 4)
    output = pair_attention(**bilinear, interaction="bilinear", backend=backend)
    assert output.item() == pytest.approx((12 + 24 + 24 + 3 * 48) / 6)


@both_interactions
@pytest.mark.parametrize("bias", [None, "nothing", "half the pairs", "all pairs of the first clip"])
def test_both_backends_and_the_weights_agree_with_a_loop_over_pairs(interaction, bias):
    tensors = make(B=6, bias=bias and (6, 2, 5, 4))
    if bias:
        cut(tensors["pair_bias"], bias)
    image_mask, audio_mask = mask_of(6, 5, dead=(2, 4), full=[0]), mask_of(6, 4, dead=(3, 4), full=[0])
    truth, *marginals = by_hand(tensors, image_mask, audio_mask, 0.7, interaction)
    options = dict(image_mask=image_mask, audio_mask=audio_mask, scale=0.7, interaction=interaction)
    for backend in "torch", "reference":
        output = pair_attention(**tensors, **options, backend=backend)
        torch.testing.assert_close(output, truth, rtol=0, atol=1e-13)
    for ours, marginal in zip(weights(tensors, **options), marginals, strict=True):
        torch.testing.assert_close(ours, marginal, rtol=0, atol=1e-14)


def natural_scale(tensors, scale, interaction):
    """Bounds of the sums of magnitudes that the output and each gradient consist of, by name.

    Each is a sum of weights P_ij, or of P_ij (dP_ij - delta), times something. Rounding is relative to this
    bound, not to the sum itself, which may cancel or underflow, and grows with the logits.
    """
    largest = (tensors[name].abs().max().item() + 1 for name in TOKENS)
    query, image_key, image_value, audio_key, audio_value = largest
    pair, (B, H, F, _), grad = PAIR[interaction], tensors["query"].shape, 5.0
    other = (lambda size: size) if interaction == "bilinear" else (lambda size: 1.0)
    logit_grad = 2 * tensors["image_value"].shape[-1] * grad * pair(image_value, audio_value)
    return {
        "output": pair(image_value, audio_value),
        "query": logit_grad * pair(image_key, audio_key) * abs(scale),
        "image_key": F * logit_grad * query * other(audio_key) * abs(scale),
        "image_value": F * grad * other(audio_value),
        "audio_key": F * logit_grad * query * other(image_key) * abs(scale),
        "audio_value": F * grad * other(image_value),
        "pair_bias": B * H * F * logit_grad,
    }


@pytest.mark.parametrize("seed", range(60))
def test_torch_agrees_with_the_reference_on_random_cases(monkeypatch, seed):
    torch.manual_seed(seed)
    pick = random.Random(seed)
    B, H, F, K, V = (pick.randint(1, most) for most in (4, 3, 9, 20, 20))
    I, A = (pick.choice((1, pick.randint(2, 70), pick.randint(2, 70))) for _ in range(2))
    broadcast = [pick.choice((1, size)) for size in (B, H, I, A)][pick.randint(0, 4) :]
    keys, interaction = pick.choice((1.0, 1.0, 100.0)), ("additive", "bilinear")[seed % 2]
    tensors = make(B, H, F, I, A, K, V, bias=pick.choice((None, broadcast, (B, H, I, A))), keys=keys)
    if "pair_bias" in tensors:
        kinds = ("nothing", "half the pairs", "row", "column", "all pairs of the first clip")
        cut(tensors["pair_bias"], pick.choice(kinds))
    options = dict(scale=pick.choice((None, 0.3, -1.5)), interaction=interaction)
    for name, tokens in ("image_mask", I), ("audio_mask", A):
        dead = [b for b in range(B) if pick.random() < 0.3]
        options[name] = pick.choice((None, mask_of(B, tokens), mask_of(B, tokens, dead=dead)))

    truth = run(tensors, **options, backend="reference")
    natural = natural_scale(tensors, options["scale"] or K**-0.5, interaction)
    tolerances = {name: 1e-14 * keys * size for name, size in natural.items()}
    for chunk in 1, 3 * B * H * F * max(I, A, K, V), streaming.CHUNK:
        monkeypatch.setattr(streaming, "CHUNK", chunk)
        for safe_sum in marginals.safe_sum, lambda dtype: INF:  # below which a pair bias is streamed
            with monkeypatch.context() as patch:
                patch.setattr(marginals, "safe_sum", safe_sum)
                assert_close(run(tensors, **options, backend="torch"), truth, tolerances)


@both_interactions
@pytest.mark.parametrize("seed", range(100))
def test_a_bias_in_blocks_is_that_of_its_pairs(interaction, seed):
    torch.manual_seed(seed)
    pick = random.Random(seed)
    B, H, F, K, V = (pick.randint(1, most) for most in (3, 2, 17, 16, 9))
    S, T, per_image, per_audio = (
        pick.randint(1, 9),
        pick.randint(1, 7),
        pick.randint(1, 8),
        pick.randint(1, 5),
    )
    I, A, keys = S * per_image, T * per_audio, pick.choice((1.0, 1.0, 60.0))
    tensors = make(B, H, F, I, A, K, V, bias=(pick.choice((1, B)), pick.choice((1, H)), S, T), keys=keys)
    cut(tensors["pair_bias"], pick.choice(("nothing", "half the pairs", "row", "column")))
    options = dict(interaction=interaction)
    for name, tokens, first in ("image_mask", I, per_image), ("audio_mask", A, per_audio):
        mask = mask_of(B, tokens, dead=[0] if pick.random() < 0.3 else [])
        mask[:, :first] &= pick.random() < 0.5  # a block without tokens
        options[name] = pick.choice((None, mask))

    def expanded(pair_bias, **others):
        rows = torch.arange(I) // per_image
        return pair_attention(pair_bias=pair_bias[..., rows, :][..., torch.arange(A) // per_audio], **others)

    truth = run(tensors, attend=expanded, **options, backend="reference")
    natural = natural_scale(tensors, K**-0.5, interaction)
    tolerances = {name: 1e-14 * keys * size for name, size in natural.items()}
    for backend in "torch", "reference":
        assert_close(run(tensors, **options, backend=backend), truth, tolerances)
    coarse = weights(tensors, **options)
    fine = tensors | {"pair_bias": tensors["pair_bias"].repeat_interleave(per_image, -2)}
    for ours, true in zip(coarse, weights(fine, **options), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


def test_a_moment_that_is_bright_and_loud_is_found_by_a_bias_of_time_alone():
    """Two bright frames, two loud moments, one of them both: with b = 0 where they are at one time and -inf
    elsewhere, all weight is on it. Without, half of it.
    """
    S, n, T = 6, 5, 6
    bright, loud = torch.zeros(S), torch.zeros(T)
    bright[[1, 4]], loud[[4, 5]] = 30.0, 30.0
    keys = [side.repeat_interleave(size)[None, None, :, None] for side, size in ((bright, n), (loud, 2))]
    together = torch.full((S, T), -INF).fill_diagonal_(0.0)
    query = torch.ones(1, 1, 1, 1)
    image, audio = pair_attention_weights(query, *keys, pair_bias=together)
    assert image.unflatten(-1, (S, n)).sum(-1)[..., 4].item() == pytest.approx(1.0)
    assert audio.unflatten(-1, (T, 2)).sum(-1)[..., 4].item() == pytest.approx(1.0)
    image, _ = pair_attention_weights(query, *keys)
    assert image.unflatten(-1, (S, n)).sum(-1)[..., 4].item() == pytest.approx(0.5)


CASES = {  # dead rows of image and audio, shape and kind of bias
    "plain": (None, None, None),
    "masks": (((), ()), None, None),
    "dead modalities": (([0], [1]), None, None),
    "bias": (None, (2, 1, 3, 4), "nothing"),
    "bias broadcast": (None, (3, 1), "nothing"),
    "bias of audio alone": (None, (1, 4), "nothing"),
    "bias with -inf": (None, (2, 1, 3, 4), "half the pairs"),
    "bias in blocks": (((), [1]), (2, 1, 3, 2), "half the pairs"),
    "bias, dead modality, no pair": (((), [1]), (2, 1, 3, 4), "all pairs of the first clip"),
}


@both_interactions
@pytest.mark.parametrize("case", CASES)
def test_gradients_against_finite_differences(monkeypatch, interaction, case):
    dead, bias, kind = CASES[case]
    tensors, options = make(2, 1, 2, 3, 4, 2, 3, bias=bias), dict(interaction=interaction)
    if bias:
        cut(tensors["pair_bias"], kind)
    if dead:
        options |= dict(image_mask=mask_of(2, 3, dead=dead[0]), audio_mask=mask_of(2, 4, dead=dead[1]))
    monkeypatch.setattr(streaming, "CHUNK", 40)  # two tokens at a time

    def outputs(*leaves):
        named = dict(zip(tensors, leaves, strict=True))
        return pair_attention(**named, **options), *weights(named, **options)

    assert torch.autograd.gradcheck(outputs, [tensor.requires_grad_() for tensor in tensors.values()])


# --- extreme logits, low precision --------------------------------------------------------------------------


@both_interactions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [None, (4, 20, 13)], ids=["no bias", "bias"])
@pytest.mark.parametrize("logits", [1.0, 60.0])
def test_error_is_at_most_twice_that_of_plain_pytorch(interaction, dtype, bias, logits):
    """In the root mean square over 48 draws: the largest error of one draw hangs on its closest tie."""
    keys = logits**0.5 if interaction == "bilinear" else logits
    tensors = make(12, 4, 4, 20, 13, 16, 8, bias=bias, keys=keys, dtype=dtype)
    options = dict(interaction=interaction)
    truth = run(tensors, **options, backend="reference", dtype=torch.float64)
    plain, ours = (run(tensors, **options, backend=backend) for backend in ("reference", "torch"))
    for name, true in truth.items():
        assert ours[name].dtype == dtype
        differences = ours[name] - true, plain[name] - true, true
        error, plain_error, size = (x.square().mean().sqrt().item() for x in differences)
        allowed = 2 * plain_error + torch.finfo(dtype).eps * size
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@both_interactions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32_and_rounded_once(monkeypatch, interaction, dtype):
    monkeypatch.setattr(streaming, "CHUNK", 1)  # one token at a time, of which the bias may be shared by all
    tensors = make(bias=(5, 4) if interaction == "additive" else (5, 1), keys=5.0, dtype=dtype)
    truth = run(tensors, interaction=interaction, dtype=torch.float32)
    for name, tensor in run(tensors, interaction=interaction).items():
        assert torch.equal(tensor, truth[name].to(dtype)), name


@both_interactions
@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (2, 1, 5, 4)], ids=str)
def test_a_bias_of_more_precision_than_the_tokens(interaction, shape):
    tensors = make(bias=shape, dtype=torch.float32)
    tensors["pair_bias"] = tensors["pair_bias"].double()
    results = run(tensors, interaction=interaction)
    truth = run(tensors, interaction=interaction, backend="reference", dtype=torch.float64)
    assert results["output"].dtype == torch.float32 and results["pair_bias"].dtype == torch.float64
    assert_close(results, truth, dict.fromkeys(truth, 1e-5))
    shown = weights(tensors, interaction=interaction)
    exact = weights({name: x.double() for name, x in tensors.items()}, interaction=interaction)
    for ours, true in zip(shown, exact, strict=True):
        assert (ours - true).abs().max() < 1e-6


@both_interactions
def test_a_pair_with_all_the_weight_has_weight_one_and_no_gradient(interaction):
    """Exactly, as in any softmax; exp(logit - log-sum-exp) would be off by 1e-4 at logits of 1000."""
    tensors = make(bias=(2, 5, 4), dtype=torch.float32)
    tensors["query"].abs_()
    tensors["image_key"][:, :, 1] = tensors["audio_key"][:, :, 2] = 20.0
    options = dict(scale=20.0, interaction=interaction)
    results = run(tensors, **options)
    value = PAIR[interaction](tensors["image_value"][:, :, 1:2], tensors["audio_value"][:, :, 2:3])
    assert torch.equal(results["output"], value.expand(results["output"].shape))
    for name in "query", "image_key", "audio_key", "pair_bias":
        assert not results[name].any(), name
    image_weights, audio_weights = weights(tensors, **options)
    assert (image_weights[..., 1] == 1).all() and (audio_weights[..., 2] == 1).all()


def test_a_pair_that_alone_is_left_has_weight_one_and_no_gradient():
    tensors = make(4, 4, 4, 5, 4, 3, 2, bias=(4, 4, 5, 4), dtype=torch.float32)
    tensors["pair_bias"][:, :, :2, :2] = tensors["pair_bias"][:, :, 0, 2] = -INF  # leaves the pair 1, 2
    masks = dict(image_mask=torch.arange(5).expand(4, -1) < 2, audio_mask=torch.arange(4).expand(4, -1) < 3)
    results = run(tensors, **masks)
    for name in "query", "image_key", "audio_key", "pair_bias":
        assert not results[name].any(), name


def test_a_bias_that_is_the_same_for_all_pairs_changes_nothing():
    """However large: it is not added to logits that it would round away."""
    tensors = make(bias=(5, 4), dtype=torch.float32)
    without = run({name: tensor for name, tensor in tensors.items() if name != "pair_bias"})
    for size in 1e4, -1e30:
        same = run(tensors | dict(pair_bias=torch.full((5, 4), size)))
        assert_close(same, without, {name: 1e-6 * tensor.abs().max() for name, tensor in without.items()})


@pytest.mark.parametrize("clips", [1, 3], ids=["shared bias", "own bias"])
@pytest.mark.parametrize("size", [60.0, 300.0])
def test_a_bias_may_remove_the_pairs_that_hold_both_maxima(size, clips):
    """Logits from -size to size, of which only the pairs of the smallest are left: of one clip in three, and
    there of one query in two.
    """
    tensors = make(3, 2, 8, 9, 7, 1, 5, dtype=torch.float32)
    tensors["query"][:, :, 0::2], tensors["query"][:, :, 1::2] = 1.0, 0.01
    tensors["image_key"][1, :, :, 0] = torch.linspace(-size, size, 9)
    tensors["audio_key"][1, :, :, 0] = torch.linspace(size, -size, 7)
    logits = tensors["image_key"][1] + tensors["audio_key"][1].mT
    tensors["pair_bias"] = torch.randn(clips, 2, 9, 7).masked_fill(logits > -1.1 * size, -INF)
    truth = run(tensors, scale=1.0, backend="reference", dtype=torch.float64)
    plain, ours = (run(tensors, scale=1.0, backend=backend) for backend in ("reference", "torch"))
    tolerances = {
        name: 2 * (plain[name] - tensor).abs().max().item() + 1.2e-7 * tensor.abs().max().item()
        for name, tensor in truth.items()
    }
    assert_close(ours, truth, tolerances)

    # sums of products of exponentials, each relative to its own maximum, underflow
    factors = tensors["image_key"][1, 0], tensors["audio_key"][1, 0], tensors["pair_bias"][clips // 2, 0]
    u, w, E = ((x - x.max()).exp() for x in factors)
    image, audio = u * (E @ w), w * (E.mT @ u)
    naive = (image.mT @ tensors["image_value"][1] + audio.mT @ tensors["audio_value"][1]) / image.sum()
    assert not torch.allclose(naive.double(), truth["output"][1, 0], atol=0.5)


# --- missing modalities, strides, memory --------------------------------------------------------------------


@both_interactions
@both_backends
@pytest.mark.parametrize("missing, other", [("image", "audio"), ("audio", "image")])
def test_a_missing_modality_takes_its_bias_with_it(interaction, backend, missing, other):
    tensors = make(bias=(2, 2, 5, 4))
    mask = torch.ones(tensors[f"{missing}_key"].shape[::2], dtype=torch.bool)
    mask[0] = False
    options = dict(interaction=interaction, backend=backend)
    results, everything = run(tensors, **{f"{missing}_mask": mask}, **options), run(tensors, **options)
    present, truth = ({name: x[1] for name, x in y.items()} for y in (results, everything))
    assert_close(present, truth, dict.fromkeys(truth, 1e-13))
    alone, gone = 0 * results["output"][0], set(tensors)
    if interaction == "additive":
        gone = {f"{missing}_key", f"{missing}_value", "pair_bias"}
        left = ("query", f"{other}_key", f"{other}_value")
        alone = scaled_dot_product_attention(*(tensors[name][0] for name in left))
    torch.testing.assert_close(results["output"][0], alone)
    for name in tensors:
        assert results[name][0].any() == (name not in gone), name


@both_interactions
@both_backends
def test_without_any_pair_left_output_and_gradients_are_zero(interaction, backend):
    tensors = make(bias=(5, 1))
    tensors["pair_bias"].fill_(-INF)
    for options in {}, dict(image_mask=mask_of(2, 5), audio_mask=mask_of(2, 4)):
        for name, tensor in run(tensors, interaction=interaction, backend=backend, **options).items():
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        assert not any(marginal.any() for marginal in weights(tensors, interaction=interaction, **options))


LAYOUTS = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "heads inside": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "slice": lambda tensor: pad(tensor, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
}


@both_interactions
@pytest.mark.parametrize("bias", [None, (2, 2, 5, 4)], ids=["no bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_inputs_left_as_they_were(interaction, bias, layout):
    strided = {name: LAYOUTS[layout](tensor) for name, tensor in make(bias=bias).items()}
    before = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in strided.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    for masks in {}, dict(image_mask=mask_of(5, 2).T, audio_mask=mask_of(1, 4).expand(2, 4)):
        ours, truth = (run(x, interaction=interaction, **masks) for x in (strided, before))
        assert_close(ours, truth, dict.fromkeys(truth, 1e-13))
    for name, tensor in before.items():
        assert torch.equal(strided[name], tensor), name


class Allocations(TorchDispatchMode):
    """The bytes of every new storage, also within the operators of avfuse."""

    INSIDE = {
        torch.ops.avfuse.pair_marginals.default: marginals.pair_marginals,
        torch.ops.avfuse.pair_marginals_backward.default: marginals.pair_marginals_backward,
    }

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.INSIDE:
            with self:
                return self.INSIDE[function](*args)
        results = function(*args, **(kwargs or {}))
        old, new = (list(filter(torch.is_tensor, tree_leaves(x))) for x in (args, results))
        known = {tensor.untyped_storage().data_ptr() for tensor in old}
        storages = [tensor.untyped_storage() for tensor in new]
        self.sizes += [storage.nbytes() for storage in storages if storage.data_ptr() not in known]
        return results


@both_interactions
@pytest.mark.parametrize(
    "bias", [None, (1024, 1024), (1024, 1), (1, 1, 1, 1024), (16, 1024), (16, 64)], ids=str
)
@pytest.mark.parametrize("streamed", [False, True], ids=["products", "streamed"])
def test_nothing_but_the_gradient_of_the_bias_grows_as_the_number_of_pairs(
    monkeypatch, interaction, bias, streamed
):
    if interaction == "bilinear" and bias and 16 in bias:
        pytest.skip("of a bias in blocks, bilinear pairs make one of an entry for each pair")
    monkeypatch.setattr(streaming, "CHUNK", 2**15)
    if streamed:
        monkeypatch.setattr(marginals, "safe_sum", lambda dtype: INF)
    tensors = make(2, 1, 2, 1024, 1024, 8, 8, bias=bias, dtype=torch.float32)
    with Allocations() as ours:
        run(tensors, interaction=interaction, image_mask=mask_of(2, 1024))
    gradients = 2 if streamed and interaction == "additive" else 1  # of streamed clips, then of all
    large = sum(size > 4 * streaming.CHUNK for size in ours.sizes)
    assert large == (gradients if bias == (1024, 1024) else 0)
    with Allocations() as reference:
        run({name: tensors[name][..., :256, :] for name in TOKENS}, backend="reference")
    assert max(reference.sizes) >= 4 * 256 * 256 * 8


@pytest.mark.parametrize("widths", [(128, 8), (8, 128)], ids=["keys", "values"])
def test_bilinear_heads_may_be_wider_than_there_are_tokens(monkeypatch, widths):
    monkeypatch.setattr(streaming, "CHUNK", 2**15)
    tensors = make(1, 2, 32, 32, 16, *widths, dtype=torch.float32)
    with Allocations() as ours:
        run(tensors, interaction="bilinear")
    assert max(ours.sizes) == 4 * 2**15


def test_pairs_in_one_chunk_are_computed_once_in_each_direction(monkeypatch):
    """Of two chunks, the backward computes the first one twice."""
    ran, logits = [], streaming._bilinear_logits
    monkeypatch.setattr(
        streaming, "_bilinear_logits", lambda *inputs: ran.append(inputs[-1]) or logits(*inputs)
    )
    for chunk, expected in (streaming.CHUNK, 1 + 1), (2 * 2 * 3 * 7 * 2, 2 + 3):
        monkeypatch.setattr(streaming, "CHUNK", chunk)
        run(make(), interaction="bilinear")
        assert len(ran) == expected
        ran.clear()


@both_interactions
def test_temporaries_take_16_mib_where_nothing_else_is_said(monkeypatch, interaction):
    monkeypatch.setattr(marginals, "safe_sum", lambda dtype: INF)
    bias = (2**20, 4) if interaction == "additive" else None
    tensors = make(1, 1, 2, 2**20, 4, 1, 1, bias=bias, dtype=torch.float32)
    with Allocations() as ours:
        pair_attention(**tensors, interaction=interaction)
    assert max(ours.sizes) == 2**24


# --- the rest of PyTorch, backends, errors ------------------------------------------------------------------


@both_interactions
@pytest.mark.parametrize("bias", [None, (5, 4), (5, 2)], ids=["no bias", "bias", "bias in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_checkpoint_autocast_and_repetition_change_nothing(monkeypatch, interaction, bias, dtype):
    monkeypatch.setattr(streaming, "CHUNK", 200)
    torch._dynamo.reset()
    compiled = torch.compile(pair_attention, fullgraph=True, backend="aot_eager")
    checkpointed = partial(checkpoint, pair_attention, use_reentrant=False)
    autocast = torch.autocast("cpu", torch.bfloat16)(pair_attention)
    tensors = make(bias=bias, dtype=dtype)
    options = dict(image_mask=mask_of(2, 5, dead=[0]), audio_mask=mask_of(2, 4), interaction=interaction)
    truth = run(tensors, **options)
    for attend in pair_attention, compiled, checkpointed, autocast:
        for name, tensor in run(tensors, attend=attend, **options).items():
            assert tensor.dtype == dtype and torch.equal(tensor, truth[name]), name


def test_backends(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert select_backend() == select_backend("torch") == "torch"
    assert select_backend("reference") == "reference"
    for backend in "cuda", "", 1, ["torch"]:
        with pytest.raises(ValueError, match="backend must be one of .*, got"):
            pair_attention(**make(), backend=backend)


@pytest.mark.parametrize("interaction", ["additive", "bilinear"])
@pytest.mark.parametrize("bias", [None, (5, 4)], ids=["no bias", "bias"])
def test_shapes_are_told_without_numbers(interaction, bias):
    """On the "meta" device, which has neither data nor autocast."""
    tensors = {name: tensor.to("meta") for name, tensor in make(bias=bias).items()}
    output = pair_attention(**tensors, interaction=interaction)
    assert output.is_meta and output.shape == pair_attention(**make(), interaction=interaction).shape


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("interaction", ["additive", "bilinear"])
@pytest.mark.parametrize("bias", [None, (5, 4)], ids=["no bias", "bias"])
def test_what_stands_for_a_dead_modality_is_not_looked_at(bias, interaction, backend):
    tensors, options = make(bias=bias), dict(audio_mask=mask_of(2, 4, dead=[1]), interaction=interaction)
    truth = run(tensors, **options)
    for name in "audio_key", "audio_value":
        tensors[name] = tensors[name].detach().clone()
        tensors[name][1] = math.nan
    for name, tensor in run(tensors, backend=backend, **options).items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-10, atol=1e-12)
    keys = {name: tensor for name, tensor in tensors.items() if not name.endswith("value")}
    assert all(weights.isfinite().all() for weights in pair_attention_weights(**keys, **options))


def test_a_fake_tensor_needs_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode():
        tensors = {name: torch.empty(tensor.shape, device="cuda") for name, tensor in make().items()}
        assert pair_attention(**tensors).device.type == "cuda"


@pytest.mark.parametrize("bias", [(2, 2, 5, 4), (1, 1, 5, 1)], ids=str)
def test_operators_of_a_pair_bias_are_what_pytorch_expects(bias):
    image_logits, image_grad = torch.randn(2, 2, 2, 3, 5).unbind()
    audio_logits, audio_grad = torch.randn(2, 2, 2, 4, 3).mT.unbind()  # not contiguous
    logits = image_logits, audio_logits, torch.randn(bias)
    operators = torch.ops.avfuse.pair_marginals, torch.ops.avfuse.pair_marginals_backward
    grads = image_grad, audio_grad, *logits
    for run_it, given in zip(
        (*operators, operators[1]), (logits, (*grads, True), (*grads, False)), strict=True
    ):
        torch.library.opcheck(run_it.default, given)
        assert all(x.is_contiguous() for x in run_it(*given))  # which PyTorch compares on CUDA alone
    for coarse in logits[2], logits[2][:, :, :1]:
        ways = (operators[0](*logits[:2], x) for x in (coarse, coarse.expand(2, 2, 5, 4)))
        for ours, true in zip(*ways, strict=True):
            torch.testing.assert_close(ours, true)
    finer = torch.randn(bias, dtype=torch.float64)
    for backward in marginals.pair_marginals_backward, streaming.stream_marginals_backward:
        assert backward(*grads[:4], finer, True)[2].dtype == torch.float64
    ours, rounded = (streaming.stream_marginals(*logits[:2], x) for x in (finer, finer.float()))
    assert all(map(torch.equal, ours, rounded))  # in the dtype of the logits


def test_clips_are_streamed_for_none_but_products_that_underflow():
    """Neither for having no pair, nor for a bias that is far below that of another head or clip."""
    image, audio, bias = (torch.randn(3, 2, *sizes) for sizes in ((2, 5), (2, 4), (5, 4)))
    bias[:, 1] -= 300.0
    bias[1] -= 300.0
    assert marginals.Products(image, audio, bias).lost is None
    image[0], audio[1], bias[2] = -INF, -INF, -INF
    assert marginals.Products(image, audio, bias).lost is None
    bias[1, 0, :, 0], audio[1], audio[1, 0, :, 0] = -INF, 0.0, 300.0
    assert marginals.Products(image, audio, bias).lost.tolist() == [1]


def test_operations_of_a_pair_bias_are_counted():
    """Logits, two marginals and weighted values; in the backward the marginals once more, two products for
    the logits, one twice as wide for the bias, and two for each of the four products forward.
    """
    tensors = {name: x.requires_grad_() for name, x in make(2, 3, 4, 5, 6, 7, 8, bias=(5, 6)).items()}
    query, pair, token, width = 2 * 2 * 3 * 4, 5 * 6, 5 + 6, 7 + 8  # a multiply-add is 2
    with FlopCounterMode(display=False) as counter:
        output = pair_attention(**tensors)
    assert counter.get_total_flops() == query * (token * width + 2 * pair)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == query * (2 * token * width + 6 * pair)


@pytest.mark.parametrize("options", [dict(bias=(5, 4)), dict(interaction="bilinear")], ids=str)
def test_second_derivatives_are_refused_not_forgotten(options):
    """Also where the gradient of the output is a constant: there PyTorch's own check sees nothing."""
    interaction = options.pop("interaction", "additive")
    tensors = {name: tensor.requires_grad_() for name, tensor in make(**options).items()}
    output = pair_attention(**tensors, interaction=interaction)
    with pytest.raises(RuntimeError, match="second derivatives of pair_attention need backend='reference'"):
        torch.autograd.grad(output.sum(), tensors["query"], create_graph=True)
    output = pair_attention(**tensors, interaction=interaction, backend="reference")
    (grad,) = torch.autograd.grad(output.sum(), tensors["query"], create_graph=True)
    assert grad.requires_grad


TRITON_REFUSES = {
    "takes float32, float16 or bfloat16, got query of torch.float64": {},
    "takes key and value widths up to 128 per head, got 6 and 129": dict(V=129, dtype=torch.float32),
    "runs on CUDA, got query on cpu": dict(dtype=torch.float32),
}


@pytest.mark.parametrize("message, sizes", TRITON_REFUSES.items(), ids=TRITON_REFUSES)
def test_triton_says_what_it_cannot_run(monkeypatch, message, sizes):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^backend='triton' {message}"):
        pair_attention(**make(**sizes), backend="triton")
    assert pair_attention(**make(**sizes)).isfinite().all()
    with pytest.raises(ValueError, match="^backend='triton' runs additive pairs only, got .*'bilinear'"):
        pair_attention(**make(), interaction="bilinear", backend="triton")
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="^backend='triton' needs the package triton, which is not"):
        pair_attention(**make(), backend="triton")


def test_xformers_says_what_it_cannot_run(monkeypatch):
    monkeypatch.setattr(ops, "HAS_XFORMERS", False)
    with pytest.raises(ValueError, match=r"^backend='xformers' needs .*: pip install 'avfuse\[xformers\]'"):
        pair_attention(**make(), backend="xformers")
    with pytest.raises(ValueError, match="^backend='xformers' runs additive pairs only, got .*'bilinear'"):
        pair_attention(**make(), interaction="bilinear", backend="xformers")
    monkeypatch.setattr(ops, "HAS_XFORMERS", True)
    with pytest.raises(ValueError, match="^backend='xformers' has no pair bias"):
        pair_attention(**make(bias=(5, 4)), backend="xformers")

    def no_operator(*_, **__):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    fake_xformers(monkeypatch, no_operator)
    with pytest.raises(ValueError, match="^backend='xformers' has no operator for .*64 on cpu: No oper"):
        pair_attention(**make(), backend="xformers")


def test_xformers_is_called_as_it_documents(monkeypatch):
    """(B, N, heads, width) tensors and an additive bias over 8 n entries; a stand-in computes with them."""

    def memory_efficient_attention(query, key, value, attn_bias, scale):
        assert attn_bias is None or attn_bias.stride(-2) % 8 == 0
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        bias = 0.0 if attn_bias is None else attn_bias
        return ((query @ key.mT * scale + bias).softmax(-1) @ value).transpose(1, 2)

    monkeypatch.setattr(ops, "HAS_XFORMERS", True)
    fake_xformers(monkeypatch, memory_efficient_attention)
    tensors = make()
    for options in {}, dict(image_mask=mask_of(2, 5, dead=[0]), audio_mask=mask_of(2, 4), scale=0.3):
        ours, truth = (run(tensors, **options, backend=backend) for backend in ("xformers", "reference"))
        assert_close(ours, truth, dict.fromkeys(truth, 1e-13))
    for name in "image_key", "image_value":  # of the clip without an image, which is not looked at
        tensors[name][0] = math.nan
    assert_close(run(tensors, **options, backend="xformers"), truth, dict.fromkeys(truth, 1e-13))


def fake_xformers(monkeypatch, attention):
    package, module = ModuleType("xformers"), ModuleType("xformers.ops")
    module.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


NO_TOKENS = [None, 1.0, [[[[1.0]]]], ones(), ones(2, 2, 5), ones(1, 2, 2, 5, 6), ones(2, 0, 5, 6)]
NO_TOKENS += [ones(2, 2, 0, 6), ones(2, 2, 5, 0), ones(2, 2, 5, 6).long(), ones(2, 2, 5, 6) > 0]
NOT_LIKE_QUERY = [ones(2, 2, 5, 6).half(), ones(2, 2, 5, 6).to("meta"), ones(1, 2, 5, 6), ones(2, 1, 5, 6)]
BAD = {
    "query": NO_TOKENS,
    "image_key": [*NO_TOKENS, *NOT_LIKE_QUERY, ones(2, 2, 5, 7)],
    "image_value": [*NO_TOKENS, *NOT_LIKE_QUERY, ones(2, 2, 4, 7)],
    "audio_key": [*NO_TOKENS, *NOT_LIKE_QUERY, ones(2, 2, 4, 1)],
    "audio_value": [*NO_TOKENS, *NOT_LIKE_QUERY, ones(2, 2, 5, 7), ones(2, 2, 4, 6)],
    "image_mask": [True, ones(2, 5), ones(2, 5).long(), *(ones(*n) > 0 for n in ((2, 4), (1, 5), (5,)))],
    "audio_mask": [[[True]], ones(2, 4).to("meta") > 0, *(ones(*n) > 0 for n in ((2, 5), (3, 4), ()))],
    "pair_bias": [0.0, ones(5, 4).long(), ones(5, 4) > 0, ones(5, 4).to("meta")]
    + [ones(*n) for n in ((4, 5), (2, 4), (0, 4), (3, 5, 4), (3, 2, 5, 4), (1, 2, 2, 5, 4))],
    "scale": [math.nan, INF, -INF, "1", 1j, True, ones(1)],
    "interaction": ["dense", "", None, 0, ["additive"]],
}


@pytest.mark.parametrize(
    "name, bad",
    [(name, bad) for name, values in BAD.items() for bad in values],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}" if torch.is_tensor(x) else repr(x),
)
def test_bad_arguments_are_named(name, bad):
    arguments = {**make(), name: bad}
    for attend in (pair_attention,) if name.endswith("value") else (pair_attention, lambda **x: weights(x)):
        with pytest.raises(ValueError, match=rf"^{name} (must|has)"):
            attend(**arguments)
